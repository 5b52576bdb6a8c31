"""Bodies of requests and of answers of text completions, without a server."""

import json

import pytest

from deployments import sse
from deployments.protocol.completions import CompletionChoice, CompletionRequest
from deployments.routers.completions import Answer
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.sampling_params import SamplingParams


def answer(model: str = "pocket", **options) -> Answer:
    body = CompletionRequest.read({"model": model, "prompt": "a", "stream": True} | options)
    return Answer('cmpl-"1"', 1, model, body, SamplingParams(n=2, temperature=1.0), str, lambda *_: "")


def update(**fields) -> StreamUpdate:
    return StreamUpdate("one", [OutputDelta(**{"index": 1, "text": "a", "token_ids": [1]} | fields)], Usage())


@pytest.mark.parametrize("text", [" word", 'a "quote"\n\t\\', "wörd \u2028 \U0001f600", sse.ANY_TEXT])
@pytest.mark.parametrize("model", ["möd/el", '"', "text", sse.ANY_TEXT])
@pytest.mark.parametrize("usage", [False, True])
def test_an_event_of_text_alone_is_that_of_the_schema(text, model, usage):
    made = answer(model, stream_options={"include_usage": usage})
    choice = CompletionChoice(index=7, text=text, logprobs=None, finish_reason=None)
    fields = {"usage": None} if usage else {}
    for _ in range(2):
        found = made.plain_event(update(text=text), 3)
        assert found.endswith(b"}\n\n") and found.count(b"\n") == 2
        wanted = sse.event(made.completion([choice], **fields))
        assert json.loads(found.removeprefix(b"data: ")) == json.loads(wanted.removeprefix(b"data: "))


def test_updates_that_hold_more_than_text_go_the_long_way():
    assert answer().plain_event(update(text="")) == b""
    assert answer().plain_event(update(finish_reason="stop")) is None
    assert answer().plain_event(update(logprobs=[])) is None
    assert answer().text_alone
    for options in ({"echo": True}, {"max_tokens": 0}, {"logprobs": 0}, {"return_token_ids": True}):
        assert not answer(**options).text_alone
