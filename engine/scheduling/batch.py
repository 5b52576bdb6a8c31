"""Plain data between scheduler and runner: a batch and a result per step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.logprobs import LogprobTensors
    from engine.request import Request


@dataclass(slots=True)
class PrefillChunk:
    """Tokens ``[start, start + count)`` of a request, all of them known to the host.

    ``completes`` is set on the chunk that reaches the last known token: it samples (or pools). ``snapshot``
    is the row of snapshots to which the sequence's recurrent states after the chunk are copied, if any.
    ``answer`` holds the tokens of a chunk of a running answer, of which the first was sampled and the others
    are forced, or drafted; None for a chunk of ``request.token_ids``. Its last ``num_drafted`` tokens are a
    draft: a token is sampled after each of them, and after the one before them. In an ``expected`` chunk the
    first token is still in flight; ``expected`` has the runs that may be forced behind it, by this token or
    :data:`~engine.structured.run_odds.ANY`, and ``answer`` is zeros, as many as the longest run needs.
    """

    request: Request
    slot: int
    start: int
    count: int
    completes: bool
    snapshot: int | None = None
    answer: list[int] | None = None
    num_drafted: int = 0
    expected: dict[int, tuple[int, ...]] | None = None

    @property
    def token_ids(self) -> list[int]:
        """The chunk's tokens."""
        if self.answer is not None:
            return self.answer
        return self.request.token_ids[self.start : self.start + self.count]

    @property
    def sampling_rows(self) -> int:
        """Number of the chunk's last tokens after each of which one is sampled."""
        return 1 + self.num_drafted if self.completes and self.request.pooling is None else 0


@dataclass(slots=True)
class Admission:
    """A request enters ``slot`` with ``num_computed`` tokens already in its first KV blocks, and their
    recurrent states in the row ``snapshot`` of snapshots, if the model has such."""

    request: Request
    slot: int
    num_computed: int
    snapshot: int | None = None


@dataclass(slots=True)
class TableUpdate:
    """KV ``blocks`` become the entries from ``column`` on of the slot's block table for a group of layers; 0
    in place of a block that was given back."""

    slot: int
    column: int
    blocks: list[int]
    group: int = 0


@dataclass(slots=True)
class ScheduledBatch:
    """One step. The runner applies ``admitted`` and ``table_updates`` before it computes.

    Attributes:
        decode_slots: int64 ``(D,)``; each slot computes its last sampled token and samples the next one. The
            array is the same object as in the previous step if the set of decoding requests is the same.
        prefills: chunks, computed in the same forward pass.
        released: slots whose request ended or was preempted since the last step.
        epochs: int64 ``(R,)``, the epoch of each sampling row's slot, see :class:`.SequenceSlots`. If another
            request has the slot when the token arrives, the token is ignored.
    """

    step: int
    decode_slots: np.ndarray
    prefills: list[PrefillChunk] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    table_updates: list[TableUpdate] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    epochs: np.ndarray | None = None
    _sampling_slots: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(chunk.count for chunk in self.prefills)

    @property
    def sampling_slots(self) -> np.ndarray:
        """int64 ``(R,)``: slots of the rows that sample, decodes first. Read when no chunks come any more."""
        if self._sampling_slots is None:
            done = [c.slot for c in self.prefills for _ in range(c.sampling_rows)]
            slots = self.decode_slots
            self._sampling_slots = np.concatenate([slots, np.asarray(done, np.int64)]) if done else slots
        return self._sampling_slots


@dataclass(slots=True)
class StepResult:
    """The runner's results for a batch, on the host.

    Attributes:
        tokens: int64 ``(R,)``, one per sampling row; -1 where none was allowed.
        logprobs: of the sampled tokens; None if no row asked.
        prompt_logprobs: ``(request, position of the first value, values)``.
        pooled: request and float32 vector, or vectors of all its tokens.
        failed: requests whose own part of the step raised, with the exception.
    """

    tokens: np.ndarray
    logprobs: LogprobTensors | None = None
    prompt_logprobs: list[tuple[Request, int, LogprobTensors]] = field(default_factory=list)
    pooled: list[tuple[Request, np.ndarray]] = field(default_factory=list)
    failed: list[tuple[Request, Exception]] = field(default_factory=list)


@dataclass(slots=True)
class StepEvents:
    """Events of one step, by sampling row.

    Attributes:
        requests: the request of each row; None if it has lost its slot since the step was scheduled, or if
            the row's token was known before it was sampled.
        tokens: int64 ``(R,)``; -1 where none was allowed.
        time: when the tokens were read, in seconds of the monotonic clock.
        finished: rows that ended, with their reason: ``stop``, ``length``, or ``error`` where no token was
            allowed.
        opening: tokens that come before a row's token, the first one sampled for its request, because its
            grammar allows no others.
        forced: tokens that follow a row's token, because its grammar allows no others. If the row has ended,
            it ended with the last of them.
        logprobs: per row the runner's log-probabilities, where any row asked.
        prompt_logprobs: per completed or partial prefill, ``(request, start, values)``.
        pooled: ``(request, float32 vector or vectors)`` of finished pooling requests.
        failed: requests that an exception ended, with that exception.
    """

    requests: list[Request | None]
    tokens: np.ndarray
    time: float = field(default_factory=time.monotonic)
    finished: dict[int, str] = field(default_factory=dict)
    opening: dict[int, list[int]] = field(default_factory=dict)
    forced: dict[int, list[int]] = field(default_factory=dict)
    logprobs: LogprobTensors | None = None
    prompt_logprobs: list[tuple[Request, int, LogprobTensors]] = field(default_factory=list)
    pooled: list[tuple[Request, np.ndarray]] = field(default_factory=list)
    failed: list[tuple[Request, Exception]] = field(default_factory=list)
