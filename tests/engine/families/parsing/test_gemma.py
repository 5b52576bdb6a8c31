"""Gemma 3's fields of config.json: the layers with a window, and the two rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from engine.errors import CheckpointError
from engine.families.parsing.decoder import parse_decoder
from engine.layers.rotary import inverse_frequencies

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 7,
    "max_position_embeddings": 128,
    "sliding_window": 9,
}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window_pattern": 3},
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]},
        {"sliding_window": 4096},
        {"rope_theta": 3e5, "rope_local_base_freq": 700.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
        {"rope_scaling": None, "rope_theta": 1e6},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 4e4}}},
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 90.0}}},
        {"hidden_activation": "gelu"},
    ],
    ids=str,
)
def test_fields_mean_what_they_mean_in_transformers(fields):
    raw = {**BASE, **fields}
    ours, theirs = parse_decoder(raw, "gemma3_text"), Gemma3TextConfig(**raw)
    slides = [name == SLIDING for name in theirs.layer_types]
    assert [layer in ours.local_layers for layer in range(7)] == slides
    window = theirs.sliding_window if theirs.sliding_window < 128 else None
    assert [ours.window(layer) for layer in range(7)] == [window if each else None for each in slides]
    rotary = Gemma3RotaryEmbedding(theirs)
    for rope, kind in ((ours.rope, FULL), (ours.local_rope, SLIDING)):
        frequencies = inverse_frequencies(rope, 32, length=1)
        torch.testing.assert_close(frequencies, getattr(rotary, f"{kind}_inv_freq"))
    assert ours.max_position == 128
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.activation == theirs.hidden_activation
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]},
        {"final_logit_softcapping": 7.0, "attn_logit_softcapping": None},
        {"hidden_activation": "gelu", "query_pre_attn_scalar": 100},
    ],
    ids=str,
)
def test_fields_of_gemma_2(fields):
    raw = {**BASE, **fields}
    ours, theirs = parse_decoder(raw, "gemma2"), Gemma2Config(**raw)
    slides = [name == SLIDING for name in theirs.layer_types]
    assert [ours.window(layer) for layer in range(7)] == [9 if each else None for each in slides]
    assert ours.logits_cap == theirs.final_logit_softcapping
    assert ours.attention_cap == theirs.attn_logit_softcapping
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert ours.activation == theirs.hidden_activation
    assert ours.tie_word_embeddings and ours.sandwich and not ours.qk_norm


def test_the_first_files_call_the_activation_by_another_name():
    raw = {**BASE, "num_key_value_heads": 2, "hidden_act": "gelu"}
    ours, theirs = parse_decoder(raw, "gemma"), GemmaConfig(**BASE, hidden_act="gelu")
    assert ours.activation == theirs.hidden_act == "gelu_pytorch_tanh"
    with pytest.raises(CheckpointError, match="use_bidirectional_attention"):
        parse_decoder({**raw, "use_bidirectional_attention": True}, "gemma")


@pytest.mark.parametrize(
    "fields",
    [
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
        {"layer_types": [FULL]},
        {"query_pre_attn_scalar": 0},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(fields):
    with pytest.raises(CheckpointError) as raised:
        parse_decoder({**BASE, **fields}, "gemma3_text")
    assert raised.value.param == next(iter(fields))
