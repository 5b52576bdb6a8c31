"""Fields of LFM3's config.json, and of LFM3-VL's tower."""

import pytest

from engine.errors import CheckpointError
from engine.families.lfm3_vl.family import FAMILY
from engine.families.parsing.decoder import parse_decoder


def test_layers_are_by_their_number_where_no_list_says_so():
    """By the configuration class of Transformers."""
    decoder = parse_decoder({"num_hidden_layers": 7}, "lfm3")
    assert decoder.linear_layers == (0, 1, 3, 5) and decoder.local_layers == (4,)
    assert decoder.windows == (None, None, None, None, 256, None, None)


@pytest.mark.parametrize(("kind", "share"), [("proportional", 0.5), ("default", 0.5), ("default", 1.0)])
def test_a_stated_share_of_a_head_turns(kind, share):
    """Public files call the type of half a head ``default``."""
    full = {"rope_type": kind, "rope_theta": 1e6, "partial_rotary_factor": share}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    rope = parse_decoder({"rope_parameters": ropes}, "lfm3").rope
    assert (rope.type, rope.turning) == (("default", 0) if share == 1 else ("proportional", 32))


def test_stated_parameters_without_a_base_have_that_of_full_attention():
    """By the configuration class of Transformers; without any parameters windows have one of their own."""
    ropes = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    stated, unstated = (parse_decoder(fields, "lfm3") for fields in ({"rope_parameters": ropes}, {}))
    assert [rope and rope.theta for rope in (stated.rope, stated.local_rope)] == [1e6, 1e6]
    assert [rope and rope.theta for rope in (unstated.rope, unstated.local_rope)] == [1e6, 1e4]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"layer_types": ["conv"] * 24}, "layer_types"),
        ({"layer_types": ["full_attention", "mamba"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(fields, param):
    with pytest.raises(CheckpointError) as error:
        parse_decoder(fields, "lfm3")
    assert error.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"layer_types": ["conv"]}, "layer_types"),
        ({"conv_kernel_size": 4}, "conv_kernel_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
    ids=str,
)
def test_a_tower_is_refused_by_the_name_of_its_field(fields, param):
    assert FAMILY.reader.vision is not None
    with pytest.raises(CheckpointError) as error:
        FAMILY.reader.vision({"vision_config": fields}, {}, 2048)
    assert error.value.param == param
