"""Every field of a decoder's config.json, left out, null and stated, means what it means in Transformers."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.families.parsing.decoder import parse_decoder
from tests.engine.families.parsing.reference import (
    CLASSES,
    Refused,
    differences,
    our_view,
    reference_view,
)

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
#: The heads of the kinds with M-RoPE where config.json states none.
MROPE = {"paddleocr_vl": 128, "qwen2_vl": None, "qwen3_vl": 128}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[Any] = [
    {},
    {"rope_type": "default"},
    {"type": "default", "rope_theta": 3e4},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": None},
    {"rope_type": "default", "type": "linear", "factor": 2.0},
    {"type": "mrope"},
    {"type": "ntk", "factor": 2.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2, "attention_factor": 3.0, "rope_theta": 5e5},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": None},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 3.7, "rope_theta": 1e5},
    {"rope_type": "dynamic"},
    {"type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": None},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": None, "beta_slow": 0, "truncate": None},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 0.5},
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5},
    {**LLAMA3, "original_max_position_embeddings": None},
    {**LLAMA3, "attention_factor": 2.0},
    {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"},
    {**LLAMA3, "factor": None},
    LONGROPE,
    {**LONGROPE, "original_max_position_embeddings": 64},
    {**LONGROPE, "original_max_position_embeddings": 32, "factor": 16.0},
    {**LONGROPE, "factor": None, "attention_factor": 1.5},
    {**LONGROPE, "long_factor": [1.0] * 3},
    {**LONGROPE, "short_factor": None},
    {**LONGROPE, "rope_type": "su"},
    {**LONGROPE, "rope_type": "yarn", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "partial_rotary_factor": 0.55},
    {"rope_type": "default", "partial_rotary_factor": None},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
]
FULL, SLIDING = "full_attention", "sliding_attention"
#: Values of each field beside null, its default and being left out.
FIELDS: dict[str, list[Any]] = {
    "vocab_size": [96],
    "hidden_size": [128, 96],
    "intermediate_size": [32],
    "num_hidden_layers": [2],
    "num_attention_heads": [8, 2],
    "num_key_value_heads": [1, 4],
    "head_dim": [16, 32],
    "hidden_act": ["gelu_pytorch_tanh", "gelu_new", "swish", "gelu", "relu", "quick_gelu"],
    "max_position_embeddings": [256],
    "rms_norm_eps": [1e-3, 1e-6, 1e-5],
    "tie_word_embeddings": [True],
    "attention_bias": [True],
    "mlp_bias": [True],
    "use_bias": [True],
    "sliding_window": [5, 127, 128, 4096],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1, 28],
    "layer_types": [[FULL, SLIDING, FULL], [FULL] * 3, [SLIDING] * 3, [FULL], [FULL, "conv", FULL]],
    "rope_theta": [5e5, 7],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES[::3],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [32, 64],
}


def lenient(kind: str, raw: Mapping[str, Any]) -> bool:
    """Return whether ``raw`` may be read although Transformers refuses it: it can only mean one thing."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return (
        any(raw.get(field, 0) is None for field in ("use_sliding_window", "max_window_layers", "head_dim"))
        or raw.get("tie_word_embeddings", 0) is None
        # Only checked: these models don't use the list.
        or (kind not in ("qwen2", "qwen2_vl", "qwen3") and "layer_types" in raw)
        # Phi-3 has the field for one rope type alone.
        or (kind == "phi3" and raw.get("original_max_position_embeddings", 0) is None)
        # Known to another kind's class, and to older releases.
        or (kind == "qwen3_vl" and rope.get("type") == "mrope")
        or (kind == "phi3" and rope.get("rope_type") == "su")
    )


def unsupported(kind: str, raw: Mapping[str, Any]) -> bool:
    """Return whether ``raw`` is refused although Transformers takes it."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return kind in MROPE and rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope")


def fill(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with an axis for each angle in the kinds that need it."""
    filled = dict(raw)
    if kind in MROPE:
        hidden = filled.get("hidden_size", default(kind, "hidden_size")) or 0
        heads = filled.get("num_attention_heads", default(kind, "num_attention_heads")) or 1
        # PaddleOCR-VL derives the size of a head where the field is null, the others where it is absent.
        derived = kind == "paddleocr_vl" and "head_dim" in filled
        head_dim = filled.get("head_dim") or (None if derived else MROPE[kind]) or hidden // heads
        third = head_dim // 6
        section = {"mrope_section": [head_dim // 2 - 2 * third, third, third]}
        present = [key for key in ("rope_scaling", "rope_parameters") if filled.get(key)]
        for key in present or ["rope_scaling"]:
            filled[key] = {**section, **(filled.get(key) or {"type": "default"})}
    return filled


def check(kind: str, raw: Mapping[str, Any]) -> bool:
    """Both refuse ``raw``, or both make the same decoder of it; which is the case."""
    try:
        theirs = reference_view(kind, raw)
    except Refused as error:
        refused = str(error)
    else:
        refused = "by us alone" if unsupported(kind, raw) else ""
    if refused:
        try:
            parse_decoder(raw, kind)
        except CheckpointError:
            return False
        assert lenient(kind, raw), (kind, raw, refused)
        return False
    config = parse_decoder(raw, kind)
    assert differences(our_view(config), theirs, config.max_position) == [], (kind, raw)
    return True


@functools.cache
def defaults(kind: str) -> Any:
    """A configuration that states nothing."""
    return CLASSES[kind][0]()


def default(kind: str, field: str) -> Any:
    return copy.deepcopy(getattr(defaults(kind), field, None))


@pytest.mark.covering(1)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", CLASSES)
def test_each_field(kind, field):
    base = BASE if field != "layer_types" else {**BASE, "use_sliding_window": True, "sliding_window": 9}
    left_out = {key: value for key, value in base.items() if key != field}
    values = [None, default(kind, field), *FIELDS[field]]
    made = [check(kind, fill(kind, left_out))]
    made += [check(kind, fill(kind, {**base, field: value})) for value in values]
    # Or agreement might be about refusing alone.
    assert any(made)


@pytest.mark.parametrize("kind", CLASSES)
def test_drawn_combinations(kind):
    """Every field left out, null or with one of its values, all drawn at once."""
    draw, made = random.Random(kind), 0
    for _ in range(40):
        raw = dict(BASE)
        for field, values in FIELDS.items():
            # Half of the files must be usable, so most fields are as they should be.
            if draw.random() < 0.3:
                raw[field] = draw.choice([default(kind, field), *values])
            elif draw.random() < 0.05:
                raw[field] = None
            elif draw.random() < 0.1:
                raw.pop(field, None)
        made += check(kind, fill(kind, raw))
    assert made > 5
