"""A device in plain Python: it keeps what was written where, and its next token depends on all it reads back.

Whatever the scheduler gets wrong about blocks, slots, chunks or pictures changes what a sequence reads from
its cache, and so its tokens.
"""

from __future__ import annotations

import marshal
from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np

from engine.core import EngineCore
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import Admission, PrefillChunk, ScheduledBatch, StepResult
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.encoder_ledger import EncoderLedger
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.prefix_cache import BlockHasher
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.snapshots import SnapshotPool

VOCAB = 50
EOS = 7
IMAGE = 99


def next_token(cells: list[tuple]) -> int:
    """The model: any change in any cell that it attends to changes the token."""
    # Version 2 writes equal values to equal bytes; later versions also write which objects are the same.
    digest = blake2b(marshal.dumps(cells, 2), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def cells_of(
    token_ids: list[int],
    spans: list[MediaSpan],
    variant: int,
    both_ways: Sequence[tuple[int, int]] = (),
    known: int | None = None,
) -> list[tuple]:
    """The cache's content for a sequence: token, position, rotary frequencies, and the picture row there.

    Cells of a range that attends both ways also hold all cells of the range, of the first ``known`` ones.
    """
    cells = [(token, index, variant, None) for index, token in enumerate(token_ids)]
    for span in spans:
        for row in range(span.length):
            index = span.offset + row
            cells[index] = (token_ids[index], index, variant, (span.item.hash, row))
    for start, end in both_ways:
        seen = tuple(cells[start : end if known is None else min(end, known)])
        cells[start:end] = [(*cell, seen) for cell in cells[start:end]]
    return cells


def variant_of(num_tokens: int, original: int | None) -> int:
    """The rotary frequencies of a sequence: those of long ones beyond ``original`` tokens."""
    return int(original is not None and num_tokens > original)


def tokens_alone(
    prompt: list[int],
    spans: list[MediaSpan],
    max_tokens: int,
    stop: bool = True,
    original: int | None = None,
    both_ways: Sequence[tuple[int, int]] = (),
    windows: Sequence[int | None] = (None,),
) -> list[int]:
    """The oracle: the request's output if nothing else existed."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        cells = cells_of(ids, spans, variant_of(len(ids), original), both_ways)
        ids.append(next_token([cell for window in windows for cell in cells[-(window or len(ids)) :]]))
        if stop and ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def picture(key: str, rows: int, offset: int) -> MediaSpan:
    item = MediaItem("image", key, rows, (1, 1, rows), (8, 8), (PlaceholderRun(IMAGE, rows, True),))
    return MediaSpan(item, offset, rows)


class _Pending:
    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def result(self) -> StepResult:
        return StepResult(self._tokens)


class SimulatedRunner:
    """Follows the runner's contract: works from its own tables, which only ``ScheduledBatch`` changes."""

    vocab_size, is_asynchronous = VOCAB, False

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        budget: int,
        hybrid: bool = False,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        # Of each group of layers.
        self.windows = windows
        self.hybrid = hybrid
        # Of each slot: the cells that its recurrent state stands for.
        self.states: list[tuple] = [()] * num_slots
        self.snapshots: dict[int, tuple] = {}
        self.block_size = block_size
        self.budget = budget
        self.cache: dict[int, tuple] = {}
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in range(num_slots)]
        self.length = [0] * num_slots
        self.last = [0] * num_slots
        self.variant = [0] * num_slots
        self.num_blocks = num_blocks
        self.computed = 0
        self.steps: list[ScheduledBatch] = []

    def execute(self, batch: ScheduledBatch, grammar_mask=None) -> _Pending:
        assert 0 < batch.num_tokens <= self.budget
        self.computed += batch.num_tokens
        self.steps.append(batch)
        for admission in batch.admitted:
            for group, blocks in enumerate(admission.request.blocks):
                self._write_table(admission.slot, group, 0, blocks)
            self.length[admission.slot] = admission.num_computed
            self.variant[admission.slot] = admission.request.rope_variant
            if self.hybrid:
                self._resume(admission)
        for update in batch.table_updates:
            self._write_table(update.slot, update.group, update.column, update.blocks)
        tokens = []
        written = []
        for slot in batch.decode_slots.tolist():
            cell = (self.last[slot], self.length[slot], self.variant[slot], None)
            written.append((slot, self.length[slot], cell))
        for chunk in batch.prefills:
            assert chunk.start == self.length[chunk.slot], "a chunk starts where the last one ended"
            request = chunk.request
            end = chunk.start + chunk.count
            cells = cells_of(
                request.token_ids, list(request.spans), request.rope_variant, request.both_ways, end
            )
            for index in range(chunk.start, end):
                written.append((chunk.slot, index, cells[index]))
        # As on a device: everything is written before anything is read.
        for slot, index, cell in written:
            for group in range(len(self.windows)):
                self.cache[self._place(slot, index, group)] = cell
            self.length[slot] = index + 1
            self.states[slot] += (cell,)
        for chunk in batch.prefills:
            self._check_visible(chunk)
            if chunk.snapshot is not None:
                self.snapshots[chunk.snapshot] = self.states[chunk.slot]
        for slot in batch.sampling_slots.tolist():
            seen = self._seen(slot)
            if self.hybrid:
                assert list(self.states[slot]) == seen, "state and cache are of different tokens"
            self.last[slot] = next_token(seen)
            tokens.append(self.last[slot])
        return _Pending(np.array(tokens, np.int64))

    def _resume(self, admission: Admission) -> None:
        """Begin with the state of the tokens that are computed already."""
        assert (admission.snapshot is None) == (admission.num_computed == 0)
        kept = admission.snapshot
        self.states[admission.slot] = () if kept is None else self.snapshots[kept]
        assert len(self.states[admission.slot]) == admission.num_computed

    def _write_table(self, slot: int, group: int, column: int, blocks: Sequence[int]) -> None:
        for index, block in enumerate(blocks, column):
            self.tables[slot][group, index] = block

    def _seen(self, slot: int, first: int | None = None) -> list:
        """The cells that the last token sees in each group, and those that tokens from ``first`` on see."""
        last = self.length[slot] - 1
        first = last if first is None else first
        return [
            self.cache.get(self._place(slot, index, group))
            for group, window in enumerate(self.windows)
            for index in range(0 if window is None else max(0, first - window + 1), last + 1)
        ]

    def _check_visible(self, chunk: PrefillChunk) -> None:
        """Every token of a chunk sees what it should, not only the last one."""
        request, end = chunk.request, chunk.start + chunk.count
        cells = cells_of(request.token_ids, list(request.spans), request.rope_variant, request.both_ways, end)
        assert self._seen(chunk.slot, chunk.start) == [
            cell
            for window in self.windows
            for cell in cells[0 if window is None else max(0, chunk.start - window + 1) : end]
        ]

    def _place(self, slot: int, index: int, group: int) -> int:
        block = self.tables[slot][group, index // self.block_size]
        assert 0 < block < self.num_blocks
        return block * self.block_size + index % self.block_size

    def recover(self) -> None:
        pass

    def check_idle(self, released: Collection[int]) -> None:
        pass


class SimulatedEngine:
    """An :class:`EngineCore` over the simulated device, and the tokens that came out of it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        max_model_len: int = 200,
        encoder_rows: int = 64,
        run_ahead: int = 1,
        prefix_caching: bool = True,
        original: int | None = None,
        num_snapshots: int | None = None,
        windows: Sequence[int | None] = (None,),
        spreads_prompts: bool = False,
    ) -> None:
        num_blocks *= len(windows)
        snapshots = None if num_snapshots is None else SnapshotPool(num_snapshots)
        hasher = BlockHasher(block_size, "model") if prefix_caching else None
        self.scheduler = Scheduler(
            KVManager(
                BlockPool(num_blocks, snapshots if hasher else None),
                hasher,
                block_size,
                windows=windows,
                step_tokens=budget,
            ),
            EncoderLedger(encoder_rows),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            recompute_beyond=original,
        )
        self.scheduler.spreads_prompts = spreads_prompts
        self.runner = SimulatedRunner(
            len(self.scheduler.slots.requests),
            num_blocks,
            block_size,
            budget,
            num_snapshots is not None,
            windows,
        )
        self.core = EngineCore(self.scheduler, self.runner, run_ahead)
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.arrivals = 0

    def add(
        self, key: str, prompt: list[int], spans: Sequence[MediaSpan] = (), max_tokens: int = 12, **changes
    ) -> Request:
        self.arrivals += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = Request(
            id=key,
            token_ids=list(prompt),
            num_prompt=len(prompt),
            params=params,
            max_total=min(len(prompt) + max_tokens, self.scheduler.max_model_len),
            stop_ids=frozenset({EOS}),
            spans=spans,
            arrival=float(self.arrivals),
            rope_variant=variant_of(len(prompt), self.scheduler.recompute_beyond),
            **changes,
        )
        self.scheduler.check(request)
        self.core.add(request)
        self.outputs[key] = []
        return request

    def step(self) -> None:
        for events in self.core.step():
            for row, request in enumerate(events.requests):
                if request is None:
                    continue
                self.outputs[request.id].append(int(events.tokens[row]))
                if row in events.finished:
                    assert request.id not in self.reasons, "ended twice"
                    self.reasons[request.id] = events.finished[row]

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                self.core.check_integrity()
                return
            self.step()
        raise AssertionError(f"still running after {limit} steps")
