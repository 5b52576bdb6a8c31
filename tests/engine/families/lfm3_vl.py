"""A tiny LFM3-VL checkpoint; Transformers' model and processor of it are read as those of Qwen3-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.engine.families import qwen
from tests.engine.tiny import LFM3_TEXT, split_shards

HAS_LFM3_VL = hasattr(transformers, "Lfm3VlConfig")


def make_lfm3_vl(path: Path, hub: bool = False, **tower: Any) -> Path:
    """A checkpoint whose tower convolves in two of four blocks; one KV head serves both heads of the others.

    Args:
        hub: as the public one is: a file for images and one for videos, and several shards.
        tower: further fields of the tower.
    """
    if not HAS_LFM3_VL:
        pytest.skip("this release of Transformers has no LFM3-VL")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "patch_size": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        **tower,
    }
    text = {"max_position_embeddings": 1024, **LFM3_TEXT}
    qwen.save(path, "Lfm3Vl", text, vision, tied=hub, seed=6, options=qwen.HALF, projector_hidden_size=40)
    if hub:
        qwen.publish_processors(path)
        split_shards(path)
    return path
