"""Values of the engine in the form that several endpoints send."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deployments.protocol.chat import ChatCompletionRequest, ChatLogprob, TopLogprob
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
    """Each token of the content with the tokens at its position that ``params`` ask for.

    Tokens that add nothing to the content, such as the one that ends it, are left out: bytes and texts join
    up to the content.
    """
    found = []
    for token, row in zip(token_ids, rows, strict=False):
        if not row[token].bytes:
            continue
        tops = [_top(other, value, name) for other, value in row.items() if is_asked(other, value, params)]
        tops.sort(key=lambda top: -top.logprob)
        found.append(ChatLogprob(**_top(token, row[token], name).model_dump(), top_logprobs=tops))
    return found


def is_asked(token: int, value: TokenLogprob, params: SamplingParams) -> bool:
    """Return whether a token is one of the likeliest that ``params`` ask for, or is named there."""
    return (value.rank or 0) <= (params.logprobs or 0) or token in params.logprob_token_ids


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


def _top(token: int, value: TokenLogprob, name: TokenName) -> TopLogprob:
    """``bytes`` is null for a token that is no text, as OpenAI has it."""
    own_bytes = list(value.bytes) or None
    return TopLogprob(token=name(token, value), logprob=finite(value.logprob), bytes=own_bytes)
