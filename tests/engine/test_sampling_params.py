import math

import pytest

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", 1.5), ("n", True),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
        ("top_k", -2), ("top_k", 1 << 63), ("top_k", 2.0),
        ("min_p", -0.1), ("min_p", 1.1),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {"x": 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", 65), ("no_repeat_ngram_size", 2.0),
        ("suppress_tokens", ["x"]), ("begin_suppress_tokens", list(range(129))),
        ("bad_words_ids", [[]]), ("bad_words_ids", [5]), ("bad_words_ids", [[1] * 17]),
        ("bad_words_ids", [[1, 2]] * 129),
        ("default_max_tokens", 0), ("max_length", 0), ("min_length", -1),
        ("allowed_token_ids", []), ("allowed_token_ids", 5), ("allowed_token_ids", "5"),
        ("logit_bias", [1]), ("logit_bias", 5), ("stop_token_ids", 5), ("stop_token_ids", {5: 1}),
        ("stop", 5), ("stop", {"a": 1}), ("bad_words", "word"), ("bad_words", 5), ("bad_words_ids", 5),
        ("suppress_tokens", 5), ("begin_suppress_tokens", "5"), ("structured", {"json": {}}),
        ("ignore_eos", "false"), ("skip_special_tokens", 0), ("include_stop_str_in_output", None),
        ("bad_words", [""]), ("bad_words", ["w"] * 65), ("bad_words", ["w" * 129]),
        ("seed", 1 << 63), ("seed", "1"),
        ("stop", ["x"] * 17), ("stop", [""]), ("stop", ["x" * 1025]), ("stop", [3]),
        ("stop_token_ids", list(range(129))),
        ("min_tokens", -1), ("min_tokens", 17),
        ("max_tokens", 0), ("max_tokens", 1 << 64),
        ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21),
    ],
)  # fmt: skip
def test_refuses_with_the_field_named(name, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", [-1, 100])
def test_refuses_ids_outside_of_the_vocabulary(name, token):
    params = SamplingParams(**{name: {token: 1.0} if name == "logit_bias" else [token]})
    params.verify(vocab_size=101, max_model_len=64) if token == 100 else None
    with pytest.raises(InvalidRequest) as caught:
        params.verify(vocab_size=100, max_model_len=64)
    assert caught.value.param == name


def test_refuses_lengths_beyond_the_context():
    SamplingParams(max_tokens=64).verify(100, 64)
    with pytest.raises(ContextLengthExceeded, match="max_tokens"):
        SamplingParams(max_tokens=65).verify(100, 64)
    with pytest.raises(ContextLengthExceeded, match="min_tokens"):
        SamplingParams(min_tokens=65, max_tokens=None).verify(100, 64)


def test_normalises():
    params = SamplingParams(stop="end", top_k=-1, logit_bias={"7": 1}, stop_token_ids=None, bad_words=None)
    assert params.stop == ["end"]
    assert params.top_k == 0
    assert params.logit_bias == {7: 1}
    assert params.stop_token_ids == [] and params.bad_words == []
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.01).greedy


def test_bad_words_are_banned_at_the_start_and_after_a_space():
    params = SamplingParams(bad_words=["no"])
    with pytest.raises(InvalidRequest, match="tokenized"):
        params.verify(1000, 100)
    params.resolve_bad_words(lambda text: [ord(c) for c in text])
    assert params.bad_sequences == [[110, 111], [32, 110, 111]]
    params.verify(1000, 100)
    with pytest.raises(InvalidRequest, match="17 tokens"):
        SamplingParams(bad_words=["w"]).resolve_bad_words(lambda text: [1] * 17)


def test_structured_output_decides_its_own_length():
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(structured=StructuredSpec(kind="json_object"), min_tokens=1)
    assert caught.value.param == "min_tokens"


def test_bad_sequences_are_words_and_ids_but_never_an_end_alone():
    params = SamplingParams(bad_words=["no"], bad_words_ids=[[2], [2, 5], [110, 111]])
    assert params.bad_sequences == [[2], [2, 5], [110, 111]]
    params.resolve_bad_words(lambda text: [ord(c) for c in text], eos_ids=[2])
    assert params.bad_sequences == [[110, 111], [32, 110, 111], [2, 5]]
