"""Writes docs/parameters.md: every parameter that the clients' types know, and what becomes of it here.

``python -m tests.deployments.parameters`` writes the page; a test compares it with the installed clients.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.embedding_create_params
import openai.types.responses.response_create_params

from deployments.protocol.base import RequestBody
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.embeddings import EmbeddingRequest
from deployments.protocol.messages import MessagesRequest
from deployments.protocol.responses import ResponsesRequest
from tests.serving import ROOT

PAGE = ROOT / "docs" / "parameters.md"

HEAD = """# Parameters

What becomes of every parameter that the types of OpenAI's and Anthropic's Python clients know.
`tests/deployments/test_parameters.py` compares this page with the installed clients.

- **works**: it does what the API says, or says which of its values can't be had.
- **refused**: 400 with the code `unsupported_parameter` and the parameter's name. Null, false, 0 and empty
  values are taken, since they ask for nothing.
- **no effect**: it is taken and no answer depends on it, for the reason given.
"""

#: What a parameter that works can't do.
LIMITS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {
        "modalities": "only `text`",
        "response_format": "numbers have at most 20 digits in a row; dates and times are those of RFC 3339, "
        "seconds with at most 9 digits behind the point",
        "service_tier": "echoed; there is one tier",
        "tools": "functions only",
        "verbosity": "only `medium`",
    },
    "/v1/responses": {
        "include": "`message.output_text.logprobs`; nothing of the other kinds is in an answer",
        "reasoning": "`effort`; thoughts come whole, without a summary",
        "service_tier": "echoed; there is one tier",
        "text": "`format`; of `verbosity` only `medium`",
        "tools": "functions only",
        "truncation": "with `auto` too, a conversation that is too long is refused, never cut",
    },
    "/v1/messages": {
        "max_tokens": "more than the context has room for is cut to what is left",
        "thinking": "off unless it is asked for",
        "tools": "the client's own",
    },
}


@dataclass(frozen=True)
class Parameters:
    """The parameters of one endpoint, as a client's types know them."""

    client: str
    path: str
    types: tuple[Any, ...]
    body: type[RequestBody]

    @property
    def names(self) -> list[str]:
        return sorted({name for each in self.types for name in each.__annotations__})

    def state(self, name: str) -> str | None:
        """Treatment of a parameter; None if nobody has decided."""
        if name in self.body.REFUSED:
            return "refused"
        if name in self.body.SILENT:
            return "no effect"
        return "works" if name in self.body.model_fields else None

    def note(self, name: str) -> str:
        notes = {"refused": self.body.REFUSED, "no effect": self.body.SILENT}
        return notes.get(self.state(name) or "", LIMITS.get(self.path, {})).get(name, "")


_CHAT = openai.types.chat.completion_create_params
_RESPONSES = openai.types.responses.response_create_params
_COMPLETIONS = openai.types.completion_create_params
_MESSAGES = anthropic.types.message_create_params

ENDPOINTS = [
    Parameters(
        "openai",
        "/v1/chat/completions",
        (_CHAT.CompletionCreateParamsNonStreaming, _CHAT.CompletionCreateParamsStreaming),
        ChatCompletionRequest,
    ),
    Parameters(
        "openai",
        "/v1/responses",
        (_RESPONSES.ResponseCreateParamsNonStreaming, _RESPONSES.ResponseCreateParamsStreaming),
        ResponsesRequest,
    ),
    Parameters(
        "openai",
        "/v1/completions",
        (_COMPLETIONS.CompletionCreateParamsNonStreaming, _COMPLETIONS.CompletionCreateParamsStreaming),
        CompletionRequest,
    ),
    Parameters(
        "openai",
        "/v1/embeddings",
        (openai.types.embedding_create_params.EmbeddingCreateParams,),
        EmbeddingRequest,
    ),
    Parameters(
        "anthropic",
        "/v1/messages",
        (_MESSAGES.MessageCreateParamsNonStreaming, _MESSAGES.MessageCreateParamsStreaming),
        MessagesRequest,
    ),
]


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(each) for each in ENDPOINTS)


def _section(given: Parameters) -> str:
    version = {"openai": openai.__version__, "anthropic": anthropic.__version__}[given.client]
    rows = "".join(f"| `{name}` | {given.state(name)} | {given.note(name)} |\n" for name in given.names)
    head = f"\n## {given.path}\n\nAs {given.client} {version} knows it.\n\n"
    return f"{head}| parameter | here | note |\n|---|---|---|\n{rows}"


def undecided() -> Iterator[str]:
    """Parameters that would be ignored in silence."""
    for each in ENDPOINTS:
        yield from (f"{each.path}: {name}" for name in each.names if each.state(name) is None)


if __name__ == "__main__":
    PAGE.write_text(page())
