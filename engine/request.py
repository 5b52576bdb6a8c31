"""A request inside the engine: token ids, spans, parameters, and the counters that scheduling lives on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.inputs.prompt import MediaSpan
from engine.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated (``n`` completions are ``n`` requests).

    There is no phase: ``num_computed`` chases ``num_tokens``. Tokens that were sampled on the device but not
    read by the host yet are counted in ``num_in_flight``; they are known to exist, not what they are.

    Attributes:
        id: unique within the engine.
        token_ids: prompt, then every output token the host has read.
        num_prompt: length of the prompt.
        spans: media of the prompt, sorted by offset.
        max_total: ``token_ids`` never grows beyond this (context limit and ``max_tokens``).
        eos_ids: token ids that end this request.
        num_computed: tokens whose KV is written or being written by enqueued steps.
        num_in_flight: sampled tokens the host has not read.
        blocks: KV block ids, in order.
        slot: row in the runner, or None while waiting.
        num_cached: prompt tokens found in the prefix cache at first admission.
    """

    id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    max_total: int
    eos_ids: frozenset[int]
    spans: Sequence[MediaSpan] = ()
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    seed: int = 0
    pooling: str | None = None
    num_computed: int = 0
    num_in_flight: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that exist: read by the host, or sampled and still in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output(self) -> int:
        """Output tokens the host has read."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]
