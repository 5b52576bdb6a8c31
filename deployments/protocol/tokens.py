"""Tokenization on the wire."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from deployments.protocol.base import RequestBody, unsupported
from deployments.protocol.plain_fields import CHAT, Shape
from engine.errors import InvalidRequest


class TokenizeRequest(RequestBody):
    """Body of ``POST /tokenize``: a text in ``prompt``, or a conversation in ``messages``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"prompt": "a red circle"}
    REFUSED: ClassVar[Mapping[str, str]] = {"chat_template": "it is set where the model is configured"}
    PLAIN: ClassVar[Mapping[str, Shape]] = CHAT

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    def check(self) -> None:
        """Check that exactly one of ``prompt`` and ``messages`` is given.

        Raises:
            InvalidRequest: neither or both of ``prompt`` and ``messages`` are given.
            UnsupportedParameter: naming the field that is for a text alone.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give prompt or messages, one of the two.", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise unsupported("add_special_tokens", "the chat template writes them")


class TokenizeResponse(BaseModel):
    """``token_strs`` is the text of each token, if it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Body of ``POST /detokenize``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"tokens": [5, 6]}

    tokens: list[int]


class DetokenizeResponse(BaseModel):
    prompt: str
