"""Constraints that leave no token: refused from the start, or an honest end in the middle of an answer."""

import json

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.constraints import check_constraints, dead_end
from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec

from . import tiny

VOCAB = 40
SPEC = StructuredSpec(kind="choice", text='["ab"]')


def bits(*tokens):
    mask = np.zeros(64, np.uint8)
    mask[list(tokens)] = 1
    return np.packbits(mask, bitorder="little").view(np.int32)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [5], "bad_words_ids": [[5]]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 6], "bad_words_ids": [[5]], "suppress_tokens": [6]}, "allowed_token_ids"),
        ({"suppress_tokens": list(range(VOCAB))}, "suppress_tokens"),
        ({"bad_words_ids": [[token] for token in range(VOCAB)]}, "bad_words_ids"),
        ({"allowed_token_ids": [1, 2], "min_tokens": 3}, "min_tokens"),
        ({"suppress_tokens": [0, *range(3, VOCAB)], "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": [5], "begin_suppress_tokens": [5]}, "begin_suppress_tokens"),
        ({"structured": SPEC, "bad_words_ids": [[7], [8]]}, "structured"),
        ({"structured": SPEC, "begin_suppress_tokens": [7, 8]}, "structured"),
        ({"structured": SPEC, "allowed_token_ids": [7, 9]}, "structured"),
        ({"structured": SPEC, "suppress_tokens": [1]}, "structured"),
        ({"structured": SPEC, "bad_words_ids": [[9]]}, "structured"),
    ],
    ids=str,
)
def test_what_is_contradictory_is_refused_with_a_field_named(fields, param):
    params = SamplingParams(**fields)
    mask = bits(7, 8) if params.structured else None
    with pytest.raises(InvalidRequest, match=r"no token|none of the choices") as caught:
        # Token 9 is in every spelling of the choice.
        check_constraints(params, VOCAB, [1, 2], [1], mask, lambda text, tokens: 9 in tokens)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [5], "bad_words_ids": [[5, 5]]},
        {"allowed_token_ids": [1, 5], "min_tokens": 3},
        {"allowed_token_ids": [5], "logit_bias": {5: -100.0}},
        {"structured": SPEC, "bad_words_ids": [[7]]},
        {"structured": SPEC, "allowed_token_ids": [1, 8, 9]},
        {"suppress_tokens": [999, -1]},
    ],
    ids=str,
)
def test_what_can_be_followed_passes(fields):
    params = SamplingParams(**fields)
    mask = bits(7, 8) if params.structured else None
    check_constraints(params, VOCAB, [1, 2], [1], mask, lambda text, tokens: 9 in tokens)


def test_a_dead_end_names_the_fields():
    params = SamplingParams(structured=SPEC, no_repeat_ngram_size=2, bad_words_ids=[[3, 4]])
    message = dead_end(params, 5)
    assert "structured, bad_words_ids and no_repeat_ngram_size together" in message and "5 tokens" in message
    assert "valid logits" in dead_end(SamplingParams(), 0)


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def llm(request, tmp_path_factory):
    """In one of the vocabularies token 0 ends answers, in the other it stands for unknown text."""
    path = tmp_path_factory.mktemp(request.param)
    getattr(tiny, f"make_{request.param}")(path)
    return LLM(str(path), kv_cache_bytes=4 << 20, device="cpu", max_model_len=128)


def choice(*texts):
    return StructuredSpec(kind="choice", text=json.dumps(texts))


def regex(text):
    return StructuredSpec(kind="regex", text=text)


def test_requests_that_contradict_themselves_are_refused(llm):
    tokenizer = llm.get_tokenizer()
    (t,) = tokenizer.encode("t", add_special_tokens=False)[-1:]
    eos = list(llm._engine.model.eos_token_ids)
    for fields, param in (
        ({"allowed_token_ids": [t], "bad_words_ids": [[t]]}, "allowed_token_ids"),
        ({"allowed_token_ids": eos, "min_tokens": 3}, "min_tokens"),
        ({"structured": choice("qt"), "bad_words": ["t"]}, "structured"),
        ({"structured": choice("tt"), "allowed_token_ids": [t + 1, *eos]}, "structured"),
        ({"structured": regex(".*"), "suppress_tokens": eos}, "structured"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            llm.generate("the", SamplingParams(**fields), use_tqdm=False)
        assert caught.value.param == param, fields
    llm.check_integrity()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_cannot_go_on_ends_as_an_error_whatever_its_neighbours(llm, temperature):
    """Alone and beside others a request has the same tokens, and no forbidden one."""
    tokenizer = llm.get_tokenizer()
    *letters, tilde = [tokenizer.encode(c, add_special_tokens=False)[-1] for c in "abcd~"]
    common = {"temperature": temperature, "seed": 3, "max_tokens": 12}
    stuck = [
        {"allowed_token_ids": letters[:3], "no_repeat_ngram_size": 1},
        {"structured": regex("[abcd]{3}~"), "bad_words_ids": [[tilde]]},
        {"structured": regex("[abcd]+~"), "no_repeat_ngram_size": 1, "suppress_tokens": [tilde]},
    ]
    free = [
        {"min_tokens": 9},
        {"structured": regex("[abcd]{9}")},
        {"no_repeat_ngram_size": 2, "logprobs": 1},
    ]
    params = [SamplingParams(**common, **fields) for fields in [*stuck, *free]]
    prompts = ["the x"] * len(params)
    together = llm.generate(prompts, params, use_tqdm=False)
    for index, (output, one) in enumerate(zip(together, params, strict=True)):
        (alone,) = llm.generate(prompts[index], one, use_tqdm=False)
        answer = output.outputs[0]
        assert answer.token_ids == alone.outputs[0].token_ids and answer.text == alone.outputs[0].text
        assert (answer.finish_reason == "error") == (index < len(stuck))
        assert output.usage.completion_tokens == len(answer.token_ids)
        assert min(answer.token_ids, default=0) >= 0
    for output, fields in zip(together, stuck, strict=False):
        answer = output.outputs[0]
        assert tilde not in answer.token_ids and set(answer.text.strip()) <= set("abcd")
        assert str(answer.stop_reason).startswith(f"The answer can't go on: after {len(answer.token_ids)} ")
        assert all(name in answer.stop_reason for name in fields if name != "structured")
    assert len(together[0].outputs[0].token_ids) == 3 and len(together[1].outputs[0].text) == 3
    llm.check_integrity()
