"""Tiny checkpoints of LLaVA-NeXT, and Transformers' processing of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.families.hub import as_on_the_hub, under_vision_model
from tests.engine.families.references import ImagesReference, with_scaled_logits
from tests.engine.tiny import TEXT_SIZES, rewrite_tensors, spread, tokenizer

SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
# 4 patches of 7 pixels per side, and 2 pixels that no patch covers.
SIDE, PATCH = 30, 7
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TOWERS = {
    "clip": lambda: transformers.CLIPVisionConfig(**_TOWER, projection_dim=32),
    "siglip": lambda: transformers.SiglipVisionConfig(**_TOWER),
}


def make_llava_next(
    path: Path, hub: bool = False, *, tower: str = "clip", text: str = "mistral", **text_fields: Any
) -> Path:
    """A checkpoint of which 2 of the tower's 3 layers are used.

    Args:
        hub: write it as the public ones are.
        tower: a key of ``TOWERS``.
        text: the decoder's ``model_type``; ``text_fields`` are further fields of it.
    """
    tok = llava_next_tokenizer()
    config = transformers.LlavaNextConfig(
        vision_config=TOWERS[tower](),
        text_config={
            "model_type": text,
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 4,
            **text_fields,
        },
        image_token_index=SPECIALS.index("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    model = spread(transformers.LlavaNextForConditionalGeneration(config), seed=13)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    images.save_pretrained(path)
    if hub:
        rewrite_tensors(path, under_vision_model)
        as_on_the_hub(path, **images.to_dict())
    return path


def llava_next_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of tiny LLaVA-NeXT and Granite 4 Vision checkpoints."""
    return tokenizer(
        SPECIALS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiles_processor(cls: Any, path: Path, config: Any, **further: Any) -> Any:
    """Transformers' processor of a whole image and its tiles.

    Args:
        cls: its class.
        path: the checkpoint's folder.
        config: the checkpoint's configuration.
        further: further arguments of ``cls``.
    """
    strategy = config.vision_feature_select_strategy
    return cls(
        transformers.LlavaNextImageProcessorPil.from_pretrained(path),
        transformers.PreTrainedTokenizerFast.from_pretrained(
            path, extra_special_tokens={"image_token": "<image>"}
        ),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        **further,
    )


class LlavaNextReference(ImagesReference):
    """Transformers' model and processor."""

    def __init__(self, path: Path) -> None:
        cls = transformers.LlavaNextForConditionalGeneration
        model = with_scaled_logits(cls.from_pretrained(path, dtype=torch.float32).eval())
        super().__init__(model, tiles_processor(transformers.LlavaNextProcessor, path, model.config))
