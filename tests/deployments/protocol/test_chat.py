"""Bodies of requests and of answers, without a server."""

import json

import pytest
from pydantic import ValidationError

from deployments import sse
from deployments.protocol.chat import ChatCompletionRequest, ChunkChoice, Delta
from deployments.routers.chat import Answer

BODY = {"model": "pocket", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_field_that_is_null_asks_for_nothing():
    plain = ChatCompletionRequest.model_validate(BODY)
    assert ChatCompletionRequest.model_validate(BODY | {"tools": None, "stop": None}) == plain
    with pytest.raises(ValidationError, match="tools"):
        ChatCompletionRequest.model_validate(BODY | {"tools": []})


@pytest.mark.parametrize(
    "text", [" word", 'a "quote"\n\t\\', "wörd \u2028 \U0001f600", "\x00\x1f\x7f</script>"]
)
@pytest.mark.parametrize("model", ["möd/el", '"', "text", '"text"'])
def test_an_event_of_text_alone_is_that_of_the_schema(text, model):
    answer = Answer('chatcmpl-"1"', 1, model)
    choice = ChunkChoice(
        index=2, delta=Delta(content=text), logprobs=None, finish_reason=None, stop_reason=None
    )
    for _ in range(2):
        found = json.loads(answer.text_event(2, text).removeprefix(b"data: "))
        assert found == json.loads(sse.event(answer.chunk([choice])).removeprefix(b"data: "))
    assert answer.text_event(2, text).endswith(b"}\n\n") and answer.text_event(2, text).count(b"\n") == 2
