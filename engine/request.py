"""A request inside the engine: token ids, media, parameters, and what scheduling remembers of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.pooling_params import PoolingParams
from engine.prompt import EmbeddedMedia, MediaSpan
from engine.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One sequence (``n`` completions are ``n`` requests).

    There is no phase: computed tokens chase known ones. While a request runs, its counters live in the
    scheduler's :class:`~engine.scheduling.slots.SlotTable`; what is here survives preemption.

    Attributes:
        id: unique within the engine.
        token_ids: the prompt, and after a preemption the output up to then as well.
        num_prompt: length of the prompt.
        params: sampling parameters; ignored by pooling requests.
        max_total: most tokens, prompt included, that the sequence may reach.
        stop_ids: token ids that end it (end-of-sequence and ``stop_token_ids``).
        spans: media of the prompt, sorted by offset.
        embeddings: encoder rows by item hash, kept until the request ends so that a preempted one can be
            computed again; numpy rows, or a device tensor where encoder and engine share a process.
        pooling: how to make an embedding; None for generation.
        grammar: the matcher that masks this sequence's tokens, if it is constrained.
        blocks: KV blocks it holds, in order; empty while waiting.
        block_hashes: hashes of its full blocks, as far as they were computed.
        slot: its row in the runner while it runs.
        rope_variant: the rotary frequencies of its keys, see
            :meth:`engine.layers.decoder_config.RopeConfig.variant`.
        num_cached: prompt tokens found in the prefix cache when it was first admitted.
        seed: what its random numbers are drawn from.
        arrival, admitted_at: ``time.monotonic()`` when it came and when it first got a slot.
    """

    id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    max_total: int
    stop_ids: frozenset[int]
    spans: Sequence[MediaSpan] = ()
    embeddings: dict[str, EmbeddedMedia | Any] = field(default_factory=dict)
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    seed: int = 0
    pooling: PoolingParams | None = None
    grammar: Any = None
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int | None = None
    rope_variant: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    admitted_at: float | None = None
    finished: bool = False
