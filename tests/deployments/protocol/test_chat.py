"""Bodies of requests and of answers, without a server."""

import json

import pytest

from deployments import sse
from deployments.protocol.chat import ChatCompletionRequest, ChunkChoice, Delta
from deployments.routers.chat import Answer

BODY = {"model": "pocket", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_field_that_is_null_asks_for_nothing():
    plain = ChatCompletionRequest.read(BODY)
    nulls = {name: None for name in ChatCompletionRequest.model_fields if name not in BODY}
    assert ChatCompletionRequest.read(BODY | nulls) == plain
    assert ChatCompletionRequest.read(BODY | {"stream_options": {"include_usage": None}}).stream_options


@pytest.mark.parametrize(
    "text", [" word", 'a "quote"\n\t\\', "wörd \u2028 \U0001f600", "\x00\x1f\x7f</script>"]
)
@pytest.mark.parametrize("model", ["möd/el", '"', sse.ANY_TEXT, f'"{sse.ANY_TEXT}"', '"choices":[]'])
@pytest.mark.parametrize("usage", [False, True])
def test_an_event_of_text_alone_is_that_of_the_schema(text, model, usage):
    options = {"stream": True, "stream_options": {"include_usage": usage}, "service_tier": "auto"}
    answer = Answer('chatcmpl-"1"', 1, model, ChatCompletionRequest.read(BODY | options))
    choice = ChunkChoice(index=2, delta=Delta(content=text), finish_reason=None)
    for _ in range(2):
        found = json.loads(answer.text_event(2, text).removeprefix(b"data: "))
        assert found == json.loads(sse.event(answer.chunk([choice])).removeprefix(b"data: "))
    assert answer.text_event(2, text).endswith(b"}\n\n") and answer.text_event(2, text).count(b"\n") == 2
