"""Fields of ``vision_config`` mean what they mean in Transformers."""

from __future__ import annotations

from importlib import import_module

import pytest

from engine.errors import CheckpointError
from engine.families.parsing.tower import axial_theta


@pytest.mark.parametrize(
    "module", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm_ocr", "paddleocr_vl", "pixtral"]
)
@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 500.0},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0},
        {"rope_parameters": {"rope_type": "axial"}},
        {"rope_scaling": {"type": "axial"}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_the_base_of_a_rotary_embedding(module, raw):
    config, embedding = _classes(module)
    try:
        theirs = embedding(config(**raw)).config.rope_parameters
    except ValueError:
        with pytest.raises(CheckpointError, match="rope type 'linear' of the vision part"):
            axial_theta(raw)
        return
    assert axial_theta(raw) == theirs["rope_theta"]


def _classes(module):
    """Transformers' classes of a tower's configuration and of its rotary embedding."""
    names = {
        "glm4v": "Glm4v",
        "glm_ocr": "GlmOcr",
        "paddleocr_vl": "PaddleOCR",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_5": "Qwen3_5",
    }
    name = names.get(module, module.title().replace("_", "").replace("Vl", "VL"))
    package = f"transformers.models.{module}"
    config = getattr(import_module(f"{package}.configuration_{module}"), f"{name}VisionConfig")
    embedding = getattr(import_module(f"{package}.modeling_{module}"), f"{name}VisionRotaryEmbedding")
    return config, embedding
