"""Values of the engine in the form that several endpoints send."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from deployments.protocol.chat import ChatCompletionRequest, ChatLogprob
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.usage import CompletionTokensDetails, PromptTokensDetails, UsageBody
from engine.outputs import TokenLogprob, Usage
from engine.sampling_params import SamplingParams

#: What log-probabilities call a token, given its id.
TokenName = Callable[[int, TokenLogprob], str]


def token_text(token: int, value: TokenLogprob) -> str:
    """The text of a token."""
    return value.decoded_token or ""


def token_id(token: int, value: TokenLogprob) -> str:
    """The id of a token, as vLLM writes it. Several tokens may have the same text."""
    return f"token_id:{token}"


def token_name(body: ChatCompletionRequest | CompletionRequest) -> TokenName:
    """Namer of tokens in the log-probabilities of an answer to ``body``: by id or by text."""
    return token_id if body.return_tokens_as_token_ids else token_text


async def whole_response(make: Callable[[], dict[str, Any]], params: SamplingParams) -> Response:
    """The response of an answer that is not streamed.

    Args:
        make: makes its JSON. Where ``params`` ask for log-probabilities, which may take seconds to write, it
            is called on a thread, and its lists may be iterators.
    """
    if params.logprobs is None and params.prompt_logprobs is None:
        return JSONResponse(make())
    # Each piece is small: the encoder holds the interpreter's lock until a piece is done.
    data = await asyncio.to_thread(lambda: _in_pieces(make(), 5).encode())
    return Response(data, media_type="application/json")


def _in_pieces(value: Any, depth: int) -> str:
    """JSON text, of which all that lies deeper than ``depth`` lists and objects is encoded at a time."""
    if depth and isinstance(value, dict):
        members = (
            f"{_in_pieces(str(name), 0)}:{_in_pieces(each, depth - 1)}" for name, each in value.items()
        )
        return "{" + ",".join(members) + "}"
    if depth and isinstance(value, list | Iterator):
        return "[" + ",".join(_in_pieces(each, depth - 1) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def usage_body(usage: Usage, reasoning_tokens: int = 0, extras: Mapping[str, Any] = {}) -> UsageBody:
    """Token counts as they are sent.

    Args:
        extras: further fields, see :func:`deployments.protocol.usage.usage_extras`.
    """
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
        **extras,
    )


def content_logprobs(
    token_ids: Sequence[int],
    rows: Sequence[Mapping[int, TokenLogprob]],
    params: SamplingParams,
    *,
    name: TokenName = token_text,
) -> list[ChatLogprob]:
    """Those of :func:`content_rows` as they are sent."""
    return [ChatLogprob(**row) for row in content_rows(token_ids, rows, params, name=name)]


def content_rows(
    token_ids: Sequence[int],
    rows: Sequence[Mapping[int, TokenLogprob]],
    params: SamplingParams,
    *,
    name: TokenName = token_text,
) -> Iterator[dict[str, Any]]:
    """Each token of the content with the tokens at its position that ``params`` ask for.

    Tokens that add nothing to the content, such as the one that ends it, are left out: bytes and texts join
    up to the content. Plain data in the form of :class:`~deployments.protocol.chat.ChatLogprob`: there may be
    a million of them.
    """
    for token, row in zip(token_ids, rows, strict=False):
        if not row[token].bytes:
            continue
        tops = [_top(other, value, name) for other, value in row.items() if is_asked(other, value, params)]
        tops.sort(key=lambda top: -top["logprob"])
        yield {**_top(token, row[token], name), "top_logprobs": tops}


def is_asked(token: int, value: TokenLogprob, params: SamplingParams) -> bool:
    """Return whether a token is one of the likeliest that ``params`` ask for, or is named there."""
    rank = value.rank
    # A named token has no rank, unless it is among the likeliest, too.
    return rank is None or rank <= (params.logprobs or 0) or token in params.logprob_token_ids


def prompt_row(row: Mapping[int, TokenLogprob] | None) -> dict[int, dict[str, Any]] | None:
    """One position of a prompt with its likeliest tokens; None for the first, which nothing precedes."""
    if row is None:
        return None
    return {
        token: {"logprob": finite(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
        for token, value in row.items()
    }


def finite(logprob: float) -> float:
    """JSON has no infinity: an impossible token counts as a very unlikely one."""
    return max(logprob, -9999.0)


def _top(token: int, value: TokenLogprob, name: TokenName) -> dict[str, Any]:
    """``bytes`` is null for a token that is no text, as OpenAI has it."""
    own_bytes = list(value.bytes) or None
    return {"token": name(token, value), "logprob": finite(value.logprob), "bytes": own_bytes}
