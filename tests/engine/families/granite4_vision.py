"""A tiny Granite 4 Vision checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.families.hub import as_on_the_hub
from tests.engine.families.llava_next import SPECIALS, llava_next_tokenizer, tiles_processor
from tests.engine.families.references import ImagesReference
from tests.engine.tiny import TEXT_SIZES, spread

#: Windows of 4 by 4 patches become 2 by 2 rows; there are four in a crop.
SIDE, PATCH, RATE = 32, 4, "2/4"
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
_WIDTH, _HEAD_DIM = 128, 64
HAS_GRANITE4_VISION = hasattr(transformers, "Granite4VisionConfig")


def projector_sizes(width: int) -> dict[str, Any]:
    """What later releases of Transformers set, whatever a file says, and 5.17 reads from it."""
    return {
        "hidden_size": width,
        "encoder_hidden_size": width,
        "num_attention_heads": width // _HEAD_DIM,
    }


def make_granite4_vision(path: Path, hub: bool = False) -> Path:
    """A checkpoint whose projectors have two heads."""
    if not HAS_GRANITE4_VISION:
        pytest.skip("this release of Transformers has no Granite 4 Vision")
    tok = llava_next_tokenizer()
    config = transformers.Granite4VisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": _WIDTH,
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
            **projector_sizes(_WIDTH),
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


def image_processor() -> transformers.LlavaNextImageProcessorPil:
    half = [0.5] * 3
    return transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=half,
        image_std=half,
    )


class Granite4VisionReference(ImagesReference):
    """Transformers' model and processor."""

    def __init__(self, path: Path) -> None:
        cls = transformers.Granite4VisionForConditionalGeneration
        model = cls.from_pretrained(path, dtype=torch.float32).eval()
        processor = tiles_processor(
            transformers.Granite4VisionProcessor,
            path,
            model.config,
            downsample_rate=model.config.downsample_rate,
        )
        super().__init__(model, processor)
