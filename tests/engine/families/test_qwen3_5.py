"""Tests of Qwen3.5 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json

import pytest

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError
from tests.engine.families.opened import parse
from tests.engine.families.qwen import FRAME, IMAGE, make_qwen3_5
from tests.engine.tiny import picture

OPTIONS = {"max_model_len": 512, "kv_cache_bytes": 32 << 20, "device": "cpu", "block_size": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen3_5(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def cold(path):
    return LLM(str(path), enable_prefix_caching=False, **OPTIONS)


def test_a_conversation_with_an_image_in_each_turn_computes_only_what_is_new(path, cold):
    llm, greedy = LLM(str(path), **OPTIONS), SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    text, images, known = "", [], 0
    for turn in range(4):
        images.append(picture(60, 44, turn))
        text += FRAME.format(f"{IMAGE} what is shown?")
        entry = {"prompt": text, "multi_modal_data": {"image": list(images)}}
        (ours,), (expected,) = (each.generate(entry, greedy, use_tqdm=False) for each in (llm, cold))
        assert ours.outputs[0].token_ids == expected.outputs[0].token_ids
        # All but the last tokens of the former prompt, and the former answer.
        assert ours.usage.cached_tokens >= known - 8 and expected.usage.cached_tokens == 0
        known = ours.usage.prompt_tokens
        text += f"{ours.outputs[0].text}<|im_end|>\n"
    assert known > 200
    llm.check_integrity()


def test_choices_begin_with_the_state_of_the_prompt(path, cold):
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True)
    entry = {"prompt": FRAME.format(IMAGE), "multi_modal_data": {"image": picture(60, 44)}}
    llm = LLM(str(path), **OPTIONS)
    found = [
        [choice.token_ids for choice in each.generate(entry, params, use_tqdm=False)[0].outputs]
        for each in (llm, cold)
    ]
    assert found[0] == found[1] and len({tuple(ids) for ids in found[0]}) == 3
    # The prompt was computed once, but for its last block.
    assert llm.metrics()["cached_tokens"] >= 2 * 56
    llm.check_integrity()


def test_states_of_all_slots_must_fit(path):
    with pytest.raises(ConfigError, match=r"max_num_seqs 5000 requests take \d+ MiB.*lower max_num_seqs"):
        LLM(str(path), **{**OPTIONS, "max_num_seqs": 5000})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["linear_attention"] * 4}, "full_attention is needed"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"linear_num_value_heads": 3}, "linear_num_key_heads 2 should divide"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(path, tmp_path, change, message):
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        parse(tmp_path)


def test_a_part_of_each_head_is_rotated(path, tmp_path):
    """A quarter, where the file does not say."""
    assert parse(path)[1].decoder.rope.rotary_dim == 16
    config = json.loads((path / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    del rope["partial_rotary_factor"]
    rope["mrope_section"] = [2, 1, 1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse(tmp_path)[1].decoder.rope.rotary_dim == 8
