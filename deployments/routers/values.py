"""Values of the engine in the form that several endpoints send."""

from collections.abc import Mapping, Sequence
from typing import Any

from deployments.protocol.chat import ChatLogprob, TopLogprob
from deployments.protocol.usage import CompletionTokensDetails, PromptTokensDetails, UsageBody
from engine.outputs import TokenLogprob, Usage


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
    token_ids: Sequence[int], rows: Sequence[Mapping[int, TokenLogprob]], count: int
) -> list[ChatLogprob]:
    """Each token of the content with the ``count`` likeliest tokens at its position.

    Tokens that add nothing to the content, such as the one that ends it, are left out: bytes and texts join
    up to the content.
    """
    found = []
    for token, row in zip(token_ids, rows, strict=False):
        if not row[token].bytes:
            continue
        tops = [_top(value) for value in row.values() if value.rank is not None and value.rank <= count]
        tops.sort(key=lambda top: -top.logprob)
        found.append(ChatLogprob(**_top(row[token]).model_dump(), top_logprobs=tops))
    return found


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


def _top(value: TokenLogprob) -> TopLogprob:
    """``bytes`` is null for a token that is no text, as OpenAI has it."""
    own_bytes = list(value.bytes) or None
    return TopLogprob(token=value.decoded_token or "", logprob=finite(value.logprob), bytes=own_bytes)
