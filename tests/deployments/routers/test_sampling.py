"""Sampling parameters over HTTP: the same on every endpoint as offline."""

from dataclasses import fields

import pytest

from deployments.protocol.generation import SAMPLING, GenerationBody
from engine import LLM, SamplingParams
from tests.serving import ROOT

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(ROOT / "models" / "pocket"), max_model_len=1024)


@pytest.fixture(scope="module")
def ids(llm) -> list[int]:
    """Tokens of the answer that no parameter changes."""
    (output,) = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    return output.outputs[0].token_ids


def test_every_parameter_has_a_field():
    spelled_by_endpoints = {"max_tokens", "logprobs", "structured", "repetition_detection"}
    # What a checkpoint's generation_config says where a request is silent.
    defaults = {"default_max_tokens"}
    # It follows from what the answer shows.
    derived = {"any_end"}
    known = {field.name for field in fields(SamplingParams) if not field.name.startswith("_")}
    assert known - spelled_by_endpoints - defaults - derived == set(SAMPLING)
    assert set(SAMPLING) <= GenerationBody.model_fields.keys()


def test_any_end_will_do_where_no_token_is_shown():
    for given in ({}, {"return_token_ids": True}, {"include_stop_str_in_output": True}):
        assert GenerationBody(model="m", **given).sampling({}).any_end == (not given)


def cases(ids: list[int]) -> dict[str, dict]:
    """Parameters, each of which changes the greedy answer."""
    return {
        "temperature and seed": {"temperature": 5.0, "seed": 7},
        "top_k": {"temperature": 1000.0, "seed": 7, "top_k": 2},
        "top_p": {"temperature": 5.0, "seed": 7, "top_p": 0.5},
        "min_p": {"temperature": 30.0, "seed": 7, "min_p": 0.2},
        "presence_penalty": {"presence_penalty": 2.0, "ignore_eos": True},
        "frequency_penalty": {"frequency_penalty": 2.0, "ignore_eos": True},
        "repetition_penalty": {"repetition_penalty": 5.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "logit_bias": {"logit_bias": {str(ids[1]): -100.0}},
        "allowed_token_ids": {"allowed_token_ids": ids[3:6]},
        "suppress_tokens": {"suppress_tokens": ids[2:3]},
        "begin_suppress_tokens": {"begin_suppress_tokens": ids[:1]},
        "bad_words": {"bad_words": ["picture"]},
        "bad_words_ids": {"bad_words_ids": [ids[1:3]]},
        "stop": {"stop": ["picture"]},
        "include_stop_str_in_output": {"stop": ["picture"], "include_stop_str_in_output": True},
        "stop_token_ids": {"stop_token_ids": ids[4:5]},
        "ignore_eos": {"ignore_eos": True, "skip_special_tokens": False},
        "min_tokens": {"min_tokens": 18, "skip_special_tokens": False},
        "min_length": {"min_length": 60, "skip_special_tokens": False},
    }


NAMES = list(cases([0] * 9))


def test_every_parameter_has_a_case():
    covered = {name for case in cases([0] * 9).values() for name in case}
    assert set(SAMPLING) - covered == {"n", "prompt_logprobs", "logprob_token_ids", "max_length"}


@pytest.mark.parametrize("name", NAMES)
async def test_every_endpoint_samples_as_offline(http, llm, ids, name, wide):
    """Without ``wide`` each parameter is sent to chats and to one of the other endpoints."""
    options = {"temperature": 0.0, **cases(ids)[name]}
    params = SamplingParams(max_tokens=20, **options)
    (chat,) = llm.chat(HELLO, params, use_tqdm=False)
    wanted = chat.outputs[0].text
    assert chat.outputs[0].token_ids != ids or chat.outputs[0].stop_reason is not None
    prompt = chat.prompt_token_ids

    async def ask(path: str, **body):
        response = await http.post(path, json={"model": "pocket", **options, **body})
        assert response.status_code == 200, response.text
        return response.json()

    made = await ask("/v1/chat/completions", messages=HELLO, max_tokens=20)
    assert made["choices"][0]["message"]["content"] == wanted
    turn = None if wide else NAMES.index(name) % 3
    if turn in (None, 0):
        made = await ask("/v1/completions", prompt=prompt, max_tokens=20)
        assert made["choices"][0]["text"] == wanted
    if turn in (None, 1):
        made = await ask("/v1/responses", input="Hello!", max_output_tokens=20)
        assert "".join(part["text"] for item in made["output"] for part in item["content"]) == wanted
    if turn in (None, 2):
        made = await ask("/v1/messages", messages=HELLO, max_tokens=20)
        assert "".join(block["text"] for block in made["content"]) == wanted


async def test_the_longest_prompt_and_answer(http, llm):
    (output,) = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    length = len(output.prompt_token_ids) + 4
    body = {"model": "pocket", "messages": HELLO, "temperature": 0, "max_length": length}
    made = (await http.post("/v1/chat/completions", json=body)).json()
    assert made["usage"]["total_tokens"] == length and made["choices"][0]["finish_reason"] == "length"
