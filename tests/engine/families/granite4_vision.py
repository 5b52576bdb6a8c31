"""A tiny Granite 4 Vision checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, spread, tokenizer

SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
#: Windows of 4 by 4 patches become 2 by 2 rows; there are four in a crop.
SIDE, PATCH, RATE = 32, 4, "2/4"
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
HAS_GRANITE4_VISION = hasattr(transformers, "Granite4VisionConfig")


def make_granite4_vision(path: Path, hub: bool = False) -> Path:
    """A checkpoint whose projectors have two heads."""
    if not HAS_GRANITE4_VISION:
        pytest.skip("this release of Transformers has no Granite 4 Vision")
    tok = granite4_tokenizer()
    config = transformers.Granite4VisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "granite4_vision_text",
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "num_hidden_layers": 6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 4,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.5,
        },
        qformer_config={
            "model_type": "blip_2_qformer",
            "intermediate_size": 48,
            "num_hidden_layers": 1 + hub,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_index=SPECIALS.index("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate=RATE,
        deepstack_layer_map=[[-2, 2], [-1, 0]] if hub else [[1, 0], [2, 4]],
        spatial_target_layers=[5, 1, 3, 4] if hub else [1, 2, 3, 5],
        spatial_vision_layer=-1 if hub else 2,
    )
    model = spread(transformers.Granite4VisionForConditionalGeneration(config), seed=13)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = image_processor()
    images.save_pretrained(path)
    if hub:
        as_on_the_hub(path, **images.to_dict())
    return path


def granite4_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return tokenizer(
        SPECIALS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def image_processor() -> transformers.LlavaNextImageProcessorPil:
    half = [0.5] * 3
    return transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=half,
        image_std=half,
    )


class Granite4VisionReference:
    """Transformers' model and processor."""

    def __init__(self, path: Path) -> None:
        cls = transformers.Granite4VisionForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        config = self.model.config
        strategy = config.vision_feature_select_strategy
        self.processor = transformers.Granite4VisionProcessor(
            transformers.LlavaNextImageProcessorPil.from_pretrained(path),
            transformers.PreTrainedTokenizerFast.from_pretrained(
                path, extra_special_tokens={"image_token": "<image>"}
            ),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(strategy == "default"),
            downsample_rate=config.downsample_rate,
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        arguments = dict(self.processor(text=prompt.text, images=pictures, return_tensors="pt"))
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
