"""A tiny checkpoint of Gemma 4 unified, and Transformers' model and processing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from tests.engine.families.gemma4 import (
    LARGE,
    MEDIA_TOKENS,
    PATCH,
    ROWS,
    SIDE,
    TEXT,
    Gemma4Reference,
    draw_gemma4_buffers,
    gemma4_tokenizer,
    save_gemma4,
    state_heads,
)
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import rewrite_tensors, split_shards, spread

_WIDTH = 40


def make_gemma4_unified(path: Path, hub: bool = False) -> Path:
    """A checkpoint as Transformers saves it, or as the public one: in parts, with a tensor of sound, and
    without a field that has its usual value."""
    tok = gemma4_tokenizer()
    text = {**TEXT, **LARGE, "vocab_size": len(tok) + 3}
    del text["hidden_size_per_layer_input"]
    config = transformers.Gemma4UnifiedConfig(
        text_config=text,
        vision_config={
            "patch_size": PATCH,
            "pooling_kernel_size": SIDE,
            "mm_embed_dim": _WIDTH,
            "output_proj_dims": _WIDTH,
            "mm_posemb_size": ROWS,
            "rms_norm_eps": 1e-3,
        },
        audio_config=None,
        **MEDIA_TOKENS,
        audio_token_id=len(tok) + 1,
    )
    model = transformers.Gemma4UnifiedForConditionalGeneration(config)
    spread(model, seed=19, embedding_std=0.05)
    draw_gemma4_buffers(model, 0.5)
    save_gemma4(path, model, tok, "Gemma4Unified")
    if hub:
        _publish(path, text)
    return path


def _publish(path: Path, text: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    state_heads(config["text_config"], text)
    config["text_config"].pop("use_bidirectional_attention", None)
    config["vision_config"]["model_patch_size"] = PATCH * SIDE
    (path / "config.json").write_text(json.dumps(config))
    rewrite_tensors(
        path, lambda found: {**found, "model.embed_audio.embedding_projection.weight": torch.ones(64, 8)}
    )
    split_shards(path)


class Gemma4UnifiedReference(Gemma4Reference):
    """Transformers' model, with the masks that its class makes for ``generate`` with a static cache.

    Without one, images attend both ways in every layer; in Gemma 4, and with such a cache, only where layers
    have a window. The image processor needs torchvision: patches are those of Gemma 4's, which are cut alike,
    and are merged by the function of that processor.
    """

    architecture = "Gemma4UnifiedForConditionalGeneration"

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.model.model.register_forward_pre_hook(self._with_masks, with_kwargs=True)

    def _with_masks(self, module: torch.nn.Module, given: Any, named: dict[str, Any]) -> Any:
        if named.get("mm_token_type_ids") is not None:
            ids = named["input_ids"]
            masks = self.model.create_masks_for_generate(
                config=self.model.config,
                inputs_embeds=torch.empty(*ids.shape, 0),
                attention_mask=named["attention_mask"],
                past_key_values=None,
                position_ids=torch.arange(ids.shape[1])[None],
                mm_token_type_ids=named["mm_token_type_ids"],
            )
            named = {**named, "attention_mask": masks}
        return given, named

    def prepared(self, processor: Any, image: Image.Image) -> dict[str, torch.Tensor]:
        (module,) = imported("gemma4_unified.image_processing_gemma4_unified")
        made = super().prepared(processor, image)
        pixels, places = made["pixel_values"], made["image_position_ids"]
        real, count = (places[0] >= 0).all(-1), int(made["num_soft_tokens_per_image"][0])
        merged, squares = module.patches_merge(pixels[:, real], places[:, real], count)
        return {**made, "pixel_values": merged, "image_position_ids": squares}
