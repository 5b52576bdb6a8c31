"""Every field of Transformers' GenerationConfig: honoured, without effect, or refused by name."""

import dataclasses
import json

import pytest
from transformers import GenerationConfig

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.generation_config import HONOURED, IGNORED, REFUSED, from_model_config, sampling_defaults
from engine.model_parts import load_sampling_defaults
from engine.sampling_params import SamplingParams, StructuredSpec
from tests.engine.tiny import make_text


def test_every_field_of_transformers_is_in_one_table():
    tables = [set(HONOURED), set(IGNORED), set(REFUSED)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    missing = vars(GenerationConfig()).keys() - set.union(*tables)
    assert not missing, "fields that are neither honoured, ignored nor refused"
    assert all(IGNORED.values())


def test_honoured_fields_name_a_sampling_parameter():
    assert set(HONOURED.values()) <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"temperature": 0.01, "top_p": 0.001, "top_k": 1},
            {"temperature": 0.01, "top_p": 0.001, "top_k": 1},
        ),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": None}, {}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"bad_words_ids": [[5], [2], [2, 5]]}, {"bad_words_ids": [[5], [2, 5]]}),
        ({"suppress_tokens": [1, -1, 10**9]}, {"suppress_tokens": [1, -1, 10**9]}),
        ({"begin_suppress_tokens": [7]}, {"begin_suppress_tokens": [7]}),
        ({"max_new_tokens": 99}, {"max_tokens": None, "default_max_tokens": 99}),
        ({"max_length": 4096}, {"max_tokens": None, "max_length": 4096}),
        ({"min_new_tokens": 4, "min_length": 9}, {"min_tokens": 4, "min_length": 9}),
        ({"stop_strings": "end"}, {"stop": "end"}),
        ({"sequence_bias": [[[5], 1.5], [[6], -2.0]]}, {"logit_bias": {5: 1.5, 6: -2.0}}),
        ({"num_beams": 1, "typical_p": 0.5, "do_sample": False}, {"temperature": 0.0}),
        ({"use_cache": False, "eos_token_id": [1], "transformers_version": "4", "a_new_field": 1}, {}),
    ],
    ids=str,
)
def test_defaults(config, expected):
    found = sampling_defaults(config, eos_ids=[2], vocab_size=10)
    assert found == expected
    SamplingParams.from_defaults(found)


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 4},
        {"num_beam_groups": 2},
        {"diversity_penalty": 0.5},
        {"constraints": [1]},
        {"force_words_ids": [[1]]},
        {"penalty_alpha": 0.6},
        {"dola_layers": "high"},
        {"guidance_scale": 1.5},
        {"watermarking_config": {"bias": 2.5}},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 3},
        {"exponential_decay_length_penalty": [5, 1.1]},
        {"forced_bos_token_id": 2},
        {"forced_eos_token_id": 2},
        {"token_healing": True},
        {"typical_p": 0.5, "do_sample": True},
        {"epsilon_cutoff": 0.1, "do_sample": True},
        {"eta_cutoff": 0.1, "do_sample": True},
        {"top_h": 0.4, "do_sample": True},
        {"sequence_bias": [[[5, 6], 1.5]]},
        {"bad_words_ids": [[10]]},
    ],
    ids=str,
)
def test_refuses_by_name_what_would_change_answers_in_silence(config):
    with pytest.raises(CheckpointError, match=rf"sets {next(iter(config))} to .* Remove the field"):
        sampling_defaults(config, vocab_size=10)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"repetition_penalty": 1.5, "hidden_size": 64}, {"repetition_penalty": 1.5}),
        ({"text_config": {"max_new_tokens": 9}, "min_length": 2}, {"max_new_tokens": 9, "min_length": 2}),
        ({"text_config": {"top_k": 3}, "top_k": 7}, {"top_k": 7}),
        # As a release of Transformers wrote them that knew no generation_config.json.
        ({"max_length": 20, "do_sample": False, "top_k": 50, "num_beams": 1, "bad_words_ids": None}, {}),
        ({"text_config": None, "num_beams": 4}, {"num_beams": 4}),
    ],
    ids=str,
)
def test_fields_of_a_config_without_a_generation_config(config, expected):
    found = from_model_config(config)
    # Beams of 1 change nothing.
    assert {name: value for name, value in found.items() if (name, value) != ("num_beams", 1)} == expected
    theirs = GenerationConfig.from_model_config(dict(config))
    assert {name: getattr(theirs, name) for name in expected} == expected


def test_a_checkpoint_without_a_generation_config(tmp_path):
    path = make_text(tmp_path, "llama")
    (path / "generation_config.json").unlink(missing_ok=True)
    config = EngineConfig(model=str(path))
    written = json.loads((path / "config.json").read_text()) | {"repetition_penalty": 1.5}
    (path / "config.json").write_text(json.dumps(written))
    assert load_sampling_defaults(config) == {"repetition_penalty": 1.5}
    (path / "config.json").write_text(json.dumps({**written, "num_beams": 3}))
    with pytest.raises(CheckpointError, match=r"^config.json sets num_beams to 3"):
        load_sampling_defaults(config)
    # A file that says nothing stands for itself.
    (path / "generation_config.json").write_text("{}")
    assert load_sampling_defaults(config) == {}


def test_every_refused_field_is_tried_above():
    (mark,) = test_refuses_by_name_what_would_change_answers_in_silence.pytestmark
    assert {next(iter(config)) for config in mark.args[1]} >= set(REFUSED)


DEFAULTS = sampling_defaults(
    {"max_new_tokens": 120, "min_new_tokens": 8, "no_repeat_ngram_size": 2, "stop_strings": ["end"]}
)


@pytest.mark.parametrize(
    ("num_prompt", "given", "shortest", "longest"),
    [
        (10, {}, 8, 90),
        (10, {"max_tokens": 5}, 5, 5),
        (10, {"max_tokens": 95}, 8, 95),
        (99, {}, 1, 1),
        (100, {}, 8, None),
        (10, {"min_tokens": 0}, 0, 90),
        (10, {"default_max_tokens": None, "max_length": 40}, 8, 30),
        (40, {"default_max_tokens": None, "max_length": 40}, 8, None),
        (10, {"min_tokens": 0, "min_length": 30}, 20, 90),
    ],
    ids=str,
)
def test_a_default_is_cut_to_what_is_left_of_the_context(num_prompt, given, shortest, longest):
    params = SamplingParams.from_defaults(DEFAULTS, **given).for_prompt(num_prompt, context=100)
    assert (params.min_tokens, params.max_tokens) == (shortest, longest)


def test_defaults_that_hold_an_answer_up_yield_to_a_grammar():
    spec = StructuredSpec(kind="json_object")
    params = SamplingParams.from_defaults(DEFAULTS, structured=spec)
    assert (params.min_tokens, params.no_repeat_ngram_size, params.stop) == (0, 0, [])
    assert params.default_max_tokens == 120
