"""Bodies of requests, without a server."""

import pytest
from pydantic import ValidationError

from deployments.protocol.chat import ChatCompletionRequest

BODY = {"model": "pocket", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_field_that_is_null_asks_for_nothing():
    plain = ChatCompletionRequest.model_validate(BODY)
    assert ChatCompletionRequest.model_validate(BODY | {"tools": None, "stop": None}) == plain
    with pytest.raises(ValidationError, match="tools"):
        ChatCompletionRequest.model_validate(BODY | {"tools": []})
