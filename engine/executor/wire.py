"""Messages from rank 0 to the other ranks: how to start, and the changes that each step brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.request import Request
from engine.runner.embedding_rows import AwaitedRows
from engine.scheduling.batch import Admission, PrefillChunk, ScheduledBatch, TableUpdate


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a rank; it replies None when its process is up, and again when its share is
    loaded."""

    config: EngineConfig
    rank: int
    address: str


@dataclass(frozen=True, slots=True)
class MeasureBlocks:
    """Asks for :meth:`.ModelRank.measure_blocks`; the reply is its result."""


@dataclass(frozen=True, slots=True)
class MakeRunner:
    """Asks for :meth:`.ModelRank.make_runner`; the reply None means that the runner is ready for steps."""

    num_blocks: int
    max_model_len: int
    num_slots: int


@dataclass(slots=True)
class StepMessage:
    """One step. While the set of decoding requests stays the same, nearly all fields are empty.

    Attributes:
        decode_slots: int64 ``(D,)``; None if they are the previous step's.
        prefills: all fields of each chunk, with the slot in place of its request, which was admitted before.
        masked: True if what :data:`engine.core.GrammarMask` writes and returns follows in a second message.
    """

    step: int
    masked: bool
    decode_slots: np.ndarray | None = None
    prefills: list[tuple[Any, ...]] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    table_updates: list[TableUpdate] = field(default_factory=list)
    released: list[int] = field(default_factory=list)


class BatchSender:
    """Turns batches into messages, in the order of steps."""

    def __init__(self) -> None:
        self._decode_slots: np.ndarray | None = None

    def message(self, batch: ScheduledBatch, masked: bool) -> StepMessage:
        """Make the message of a batch. Pickle it before the batch is executed: requests change afterwards."""
        slots = batch.decode_slots if batch.decode_slots is not self._decode_slots else None
        self._decode_slots = batch.decode_slots
        return StepMessage(
            batch.step,
            masked,
            slots,
            [
                (c.slot, c.start, c.count, c.completes, c.snapshot, c.answer, c.num_drafted, c.expected)
                for c in batch.prefills
            ],
            [
                Admission(_copy(a.request, a.num_computed), a.slot, a.num_computed, a.snapshot)
                for a in batch.admitted
            ],
            batch.table_updates,
            batch.released,
        )


class BatchReceiver:
    """Turns messages back into batches. Remembers the running requests by slot."""

    def __init__(self) -> None:
        self._decode_slots = np.zeros(0, np.int64)
        self._requests: dict[int, Request] = {}

    def batch(self, message: StepMessage) -> ScheduledBatch:
        for slot in message.released:
            self._requests.pop(slot, None)
        for admission in message.admitted:
            self._requests[admission.slot] = admission.request
        if message.decode_slots is not None:
            self._decode_slots = message.decode_slots
        for update in message.table_updates:
            end = update.column + len(update.blocks)
            self._requests[update.slot].blocks[update.group][update.column : end] = update.blocks
        prefills = [
            PrefillChunk(
                self._requests[slot], slot, start, count, completes, snapshot, answer, drafted, expected
            )
            for slot, start, count, completes, snapshot, answer, drafted, expected in message.prefills
        ]
        return ScheduledBatch(
            message.step,
            self._decode_slots,
            prefills,
            message.admitted,
            message.table_updates,
            message.released,
        )


def _copy(request: Request, num_computed: int) -> Request:
    """Copy the fields of a request that a runner reads. Embeddings are sent from device to device instead.

    Table updates report which blocks it gets and gives back afterwards.
    """
    wanted = {s.item.hash for s in request.spans if s.offset + s.length > num_computed}
    return Request(
        request.id,
        request.token_ids,
        request.num_prompt,
        request.params,
        request.max_total,
        request.stop_ids,
        request.spans,
        {key: AwaitedRows.like(rows) for key, rows in request.embeddings.items() if key in wanted},
        seed=request.seed,
        positions=request.positions,
        position_delta=request.position_delta,
        both_ways=request.both_ways,
        one_way=request.one_way,
        pooling=request.pooling,
        blocks=request.blocks,
        rope_variant=request.rope_variant,
        num_preemptions=request.num_preemptions,
    )
