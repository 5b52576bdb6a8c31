"""Results of generation: ``RequestOutput`` for offline use, ``OutputDelta`` for streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]

T = TypeVar("T")


@dataclass(slots=True)
class TokenLogprob:
    """Natural log-probability of one token by the raw logits (before temperature and masks).

    Attributes:
        rank: 1 for the likeliest; None for a token that was asked for by its id and is none of the likeliest.
        decoded_token: the text that the token completes; its name where it adds no text. Joined together the
            texts of an answer's tokens are the answer.
        bytes: UTF-8 bytes that the token adds to the text, perhaps a part of a character. Empty for a token
            that ends the answer, for a skipped special token, and for those of a stop string that is cut off.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    bytes: bytes = b""


@dataclass(slots=True)
class OutputDelta:
    """New text and tokens of one sequence since its last delta.

    Attributes:
        index: which of the ``n`` completions.
        text: characters that are final: no broken UTF-8, nothing that could still become a stop string.
        token_ids: all tokens since the last delta.
        logprobs: per token a map of token id to log-probability, the sampled token first; None if not asked.
        finish_reason: set on the last delta of the sequence.
        stop_reason: the stop string or stop token id that ended it; ``repetition_detected`` with the finish
            reason ``repetition``; with the finish reason ``error`` a
            sentence that says why no token could follow.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, TokenLogprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Usage:
    """Token counts of a request. ``cached_tokens`` of the prompt came from the prefix cache. Those of several
    requests can be added."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(slots=True)
class EngineTimes:
    """Seconds up to a request's first token: waiting for a slot, then computing the prompt."""

    queue_s: float
    prefill_s: float


@dataclass(slots=True)
class StreamUpdate:
    """One item of an engine stream: deltas of any of the request's sequences, and the usage so far.

    Attributes:
        times: set on the update that holds the request's first token.
    """

    request_id: str
    deltas: list[OutputDelta]
    usage: Usage
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    finished: bool = False
    times: EngineTimes | None = None


def merge_updates(first: StreamUpdate, second: StreamUpdate) -> StreamUpdate:
    """Two successive updates of one request as one. The lists of ``first`` are extended in place: to merge
    many updates takes a time that is linear in their number."""
    deltas = {delta.index: delta for delta in first.deltas}
    for delta in second.deltas:
        earlier = deltas.setdefault(delta.index, delta)
        if earlier is delta:
            continue
        # A text to which nothing else refers grows in place.
        text, earlier.text = earlier.text, ""
        text += delta.text
        earlier.text = text
        earlier.token_ids += delta.token_ids
        earlier.logprobs = _joined(earlier.logprobs, delta.logprobs)
        earlier.finish_reason = delta.finish_reason
        earlier.stop_reason = delta.stop_reason
    prompt = _joined(first.prompt_logprobs, second.prompt_logprobs)
    times = first.times or second.times
    return StreamUpdate(
        second.request_id, list(deltas.values()), second.usage, prompt, second.finished, times
    )


def _joined(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    """``first``, extended by ``second``; None stands for no list."""
    if first is None or second is None:
        return first if second is None else second
    first += second
    return first


@dataclass(slots=True)
class CompletionOutput:
    """One finished completion."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, TokenLogprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """One finished request of :class:`engine.llm.LLM`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage = field(default_factory=Usage)
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    finished: bool = True


@dataclass(slots=True)
class EmbeddingOutput:
    """Pooled hidden states.

    Attributes:
        embedding: the vector, of length ``hidden_size``; empty with the pooling ``all``.
        token_embeddings: with the pooling ``all`` float32 ``(tokens, hidden_size)``, else None.
    """

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]
    usage: Usage = field(default_factory=Usage)
    token_embeddings: np.ndarray | None = None
