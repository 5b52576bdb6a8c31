"""The arrays that a step brings from the host to the device, all in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice, repeat, takewhile
from typing import Generic, TypeVar

import numpy as np
import torch

from engine.layers.rotary import Rotary
from engine.prompt import MediaSpan
from engine.request import Request, attributed_to
from engine.runner.draft_rows import draft_columns
from engine.runner.staging import upload_together
from engine.scheduling.batch import PrefillChunk, ScheduledBatch, TableUpdate
from engine.structured.run_odds import ANY

#: int64 arrays: numpy's on the host, torch's on the device.
A = TypeVar("A", np.ndarray, torch.Tensor)


@dataclass(slots=True)
class ChunkArrays(Generic[A]):
    """Prompt chunks of T tokens, in a step of S slots of which the first D decode; the chunks' rows follow
    the decoding rows.

    Attributes:
        ids: ``(T,)``, the chunks' tokens.
        positions: ``(T,)``, or ``(3, T)`` with M-RoPE, rows of the rotary tables.
        kv_slots: ``(groups, T)``, where their keys and values go, for each group of layers.
        slots: ``(S,)``.
        query_start: ``(S + 1,)``, first row of each slot, and the number of rows.
        ends: ``(S - D,)``, computed tokens of each chunk's request after the step.
        sampling_slots: ``(R,)``, slots that sample.
        sampling_rows: ``(R + padding,)``, their rows; the padding repeats row 0.
        embedded_rows: ``(E,)``, rows that embedding rows overwrite, span after span.
        key_ends: ``(T,)``, see :class:`~engine.kernels.paged.AttentionMetadata`; ``(0,)`` for most models.
        forced: ``(2, n)``, slots and tokens of answers that were not sampled; the first token of a chunk was.
        in_flight: ``(3, E)``, of each expected chunk the index in :attr:`ids` of its first token, its slot,
            and the sequence's length behind that token.
        choices: ``(2, A, E)``, tokens that this first token may be, :data:`ANY` in the last row, and the
            lengths of the runs behind them.
        run_places: ``(2, n)``, indices in :attr:`ids` of the tokens behind the first ones, and the number of
            their expected chunk.
        runs: ``(A, n)``, these tokens by choice.
        drafts: ``(R, 2 + K)``, see :class:`~engine.runner.draft_rows.DraftRows`; ``(0, 2)`` for most steps.
        long_prompts: ``(3, n)``, arguments of :meth:`Rotary.write_prompt_rows`; n is 0 for most models.
    """

    ids: A
    positions: A
    kv_slots: A
    slots: A
    query_start: A
    ends: A
    sampling_slots: A
    sampling_rows: A
    embedded_rows: A
    key_ends: A
    forced: A
    in_flight: A
    choices: A
    run_places: A
    runs: A
    drafts: A
    long_prompts: A

    @classmethod
    def of(
        cls, batch: ScheduledBatch, rotary: Rotary, *, block_size: int, padding: int, both_ways: bool
    ) -> ChunkArrays[np.ndarray]:
        """The chunks of ``batch``, on the host.

        Args:
            rotary: the model's; its tables give positions their rows.
            padding: entries of padding in :attr:`sampling_rows`.
            both_ways: the model needs :attr:`key_ends`.

        Raises:
            RequestFault: what a request brings does not go together.
        """
        chunks, decodes = batch.prefills, len(batch.decode_slots)
        last_rows = decodes + np.cumsum([c.count for c in chunks]) - 1
        counts = np.array([c.sampling_rows for c in chunks], np.int64)
        behind = np.arange(counts.sum()) - np.repeat(counts.cumsum(), counts)
        sampling = np.repeat(last_rows + 1, counts) + behind
        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        kv_slots: list[np.ndarray] = []
        embedded: list[np.ndarray] = []
        answers = list(takewhile(lambda chunk: chunk.answer is not None, chunks))
        if answers:
            arrays = _answer_arrays(answers, rotary, block_size)
            for found, array in zip((ids, positions, kv_slots), arrays, strict=True):
                found.append(array)
        for chunk, row in islice(chunk_rows(batch), len(answers), None):
            with attributed_to(chunk.request):
                end = chunk.start + chunk.count
                ids.append(np.array(chunk.token_ids, np.int64))
                positions.append(_positions(chunk, rotary))
                kv_slots.append(_kv_slots(chunk, block_size))
                embedded += [span_rows(s, chunk.start, end)[2] + row for s in chunk.request.spans]
        long_prompts = _long_prompts(
            chunks[len(answers) :], positions[bool(answers) :], rotary.first_prompt_row
        )
        return ChunkArrays[np.ndarray](
            ids=np.concatenate(ids),
            positions=np.concatenate(positions, axis=-1),
            kv_slots=np.concatenate(kv_slots, axis=1),
            slots=np.concatenate([batch.decode_slots, [c.slot for c in chunks]]),
            query_start=np.concatenate([np.arange(decodes + 1), last_rows + 1]),
            ends=np.array([c.start + c.count for c in chunks], np.int64),
            sampling_slots=batch.sampling_slots,
            sampling_rows=np.concatenate([np.arange(decodes), sampling, np.zeros(padding, np.int64)]),
            embedded_rows=np.concatenate([*embedded, np.zeros(0, np.int64)]),
            key_ends=np.concatenate(
                [_key_ends(chunk) for chunk in chunks] if both_ways else [np.zeros(0, np.int64)]
            ),
            forced=forced_tokens(chunks),
            **_expected_arrays(list(takewhile(lambda chunk: chunk.expected is not None, chunks))),
            drafts=draft_columns(batch),
            long_prompts=long_prompts,
        )


@dataclass(slots=True)
class StepArrays(Generic[A]):
    """The arrays of a step that the device does not have yet.

    Attributes:
        tables: ``(4, n)``, entries of block tables that change: group, slot, column and block; None for none.
        deltas: ``(2, n)``, slots of admitted requests, and row of the rotary tables minus index for tokens
            after the prompt; None for none.
        chunks: None if the step only decodes.
    """

    tables: A | None = None
    deltas: A | None = None
    chunks: ChunkArrays[A] | None = None

    @classmethod
    def changes(cls, batch: ScheduledBatch, rotary: Rotary) -> StepArrays[np.ndarray]:
        """The arrays of ``batch`` on the host, without its chunks."""
        arrays = StepArrays[np.ndarray]()
        if batch.admitted or batch.table_updates:
            arrays.tables = _table_entries(batch)
        if batch.admitted:
            slots = [admission.slot for admission in batch.admitted]
            deltas = [_delta(admission.request, rotary) for admission in batch.admitted]
            arrays.deltas = np.array([slots, deltas], np.int64)
        return arrays


def to_device(arrays: StepArrays[np.ndarray], device: torch.device) -> StepArrays[torch.Tensor]:
    """A copy of ``arrays`` on the device, enqueued without waiting."""
    chunks = [] if arrays.chunks is None else [getattr(arrays.chunks, name) for name in _CHUNK_FIELDS]
    given = [array for array in (arrays.tables, arrays.deltas, *chunks) if array is not None]
    if not given:
        return StepArrays()
    sent = iter(upload_together(given, device))
    return StepArrays(
        tables=None if arrays.tables is None else next(sent),
        deltas=None if arrays.deltas is None else next(sent),
        chunks=None if arrays.chunks is None else ChunkArrays(*sent),
    )


_CHUNK_FIELDS = [field.name for field in fields(ChunkArrays)]


def chunk_rows(batch: ScheduledBatch) -> Iterator[tuple[PrefillChunk, int]]:
    """Each chunk of a step with the index of its first row."""
    row = len(batch.decode_slots)
    for chunk in batch.prefills:
        yield chunk, row
        row += chunk.count


def span_rows(span: MediaSpan, start: int, end: int) -> tuple[int, int, np.ndarray]:
    """The embedding rows of ``span`` that tokens ``[start, end)`` take: the first, the last + 1, and the
    indices of their tokens relative to ``start``."""
    first, last = span.rows_before(start), span.rows_before(end)
    tokens = np.arange(first, last) if span.embed_index is None else span.embed_index[first:last]
    return first, last, tokens + span.offset - start


def _delta(request: Request, rotary: Rotary) -> int:
    """Row of the rotary tables minus index, for tokens after the prompt; for all if positions are plain."""
    return request.position_delta if rotary.rope.mrope_section else rotary.offset(request.rope_variant)


def _answer_arrays(
    chunks: Sequence[PrefillChunk], rotary: Rotary, block_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and places in KV memory, as :class:`ChunkArrays` has them, of chunks of answers: many
    short ones."""
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    deltas = np.array([_delta(chunk.request, rotary) for chunk in chunks], np.int64)
    index = np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)
    positions = index + np.repeat(deltas, counts)
    if rotary.rope.mrope_section:
        positions = np.broadcast_to(positions, (3, len(positions)))
    ids = np.array([token for chunk in chunks for token in chunk.token_ids], np.int64)
    columns, blocks = (index // block_size).tolist(), []
    for group in range(len(chunks[0].request.blocks)):
        rows = [held for chunk in chunks for held in repeat(chunk.request.blocks[group], chunk.count)]
        blocks.append([held[column] for held, column in zip(rows, columns, strict=True)])
    return ids, positions, np.array(blocks, np.int64) * block_size + index % block_size


def _positions(chunk: PrefillChunk, rotary: Rotary) -> np.ndarray:
    """Rows of the rotary tables ``(count,)``, or ``(3, count)`` with M-RoPE, of a chunk's tokens."""
    request, delta = chunk.request, _delta(chunk.request, rotary)
    plain = np.arange(chunk.start, chunk.start + chunk.count, dtype=np.int64)
    if not rotary.rope.mrope_section:
        return plain + delta
    if request.positions is None:
        return np.broadcast_to(plain, (3, chunk.count))
    inside = request.positions[:, chunk.start : chunk.start + chunk.count]
    beyond = plain[inside.shape[1] :] + delta
    return np.concatenate([inside, np.broadcast_to(beyond, (3, len(beyond)))], axis=1)


def _key_ends(chunk: PrefillChunk) -> np.ndarray:
    """int64 ``(count,)``: where the keys end that each token of a chunk sees."""
    ends = np.arange(chunk.start + 1, chunk.start + chunk.count + 1)
    for start, stop in chunk.request.both_ways:
        ends[max(start - chunk.start, 0) : max(stop - chunk.start, 0)] = stop
    return ends


def _expected_arrays(chunks: Sequence[PrefillChunk]) -> dict[str, np.ndarray]:
    """The fields of :class:`ChunkArrays` about the expected ``chunks``."""
    if not chunks:
        return _NO_EXPECTED
    most = 1 + max(len(chunk.expected or ()) for chunk in chunks)
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    firsts = counts.cumsum() - counts
    choices = np.full((2, most, len(chunks)), ANY, np.int64)
    choices[1] = 0
    runs = np.zeros((most, counts.sum()), np.int64)
    for number, (chunk, first) in enumerate(zip(chunks, firsts.tolist(), strict=True)):
        for choice, (token, run) in enumerate((chunk.expected or {}).items()):
            choices[:, choice, number] = token, len(run)
            runs[choice, first + 1 : first + 1 + len(run)] = run
    behind = np.ones(counts.sum(), bool)
    behind[firsts] = False
    places = np.stack([np.arange(counts.sum()), np.repeat(np.arange(len(chunks)), counts)])
    slots, lengths = [chunk.slot for chunk in chunks], [chunk.start + 1 for chunk in chunks]
    return {
        "in_flight": np.array([firsts, slots, lengths], np.int64),
        "choices": choices,
        "run_places": places[:, behind],
        "runs": runs[:, behind],
    }


_NO_EXPECTED = {
    "in_flight": np.zeros((3, 0), np.int64),
    "choices": np.zeros((2, 1, 0), np.int64),
    "run_places": np.zeros((2, 0), np.int64),
    "runs": np.zeros((1, 0), np.int64),
}


def forced_tokens(chunks: Sequence[PrefillChunk]) -> np.ndarray:
    """int64 ``(2, n)``: see :class:`ChunkArrays`."""
    runs = [c for c in chunks if c.answer is not None and not c.num_drafted and c.expected is None]
    found = [(chunk.slot, token) for chunk in runs for token in chunk.token_ids[1:]]
    return np.array(found, np.int64).reshape(-1, 2).T


def _long_prompts(
    chunks: Sequence[PrefillChunk], positions: Sequence[np.ndarray], first_row: int
) -> np.ndarray:
    """Assign reserved rows of the rotary tables to prompt tokens whose frequencies depend on their prompt's
    length.

    Args:
        positions: of each chunk, from :func:`_positions`; replaced in place by the assigned rows.
        first_row: the first reserved row; 0 if there is none.

    Returns:
        int64 ``(3, n)``: the rows, and the positions and prompt lengths to fill them for.
    """
    found = [np.zeros((3, 0), np.int64)]
    for chunk, where in zip(chunks, positions, strict=True):
        request = chunk.request
        count = min(request.num_prompt - chunk.start, chunk.count)
        if first_row and request.rope_variant and count > 0:
            rows = np.arange(first_row, first_row + count)
            found.append(np.stack([rows, where[:count], np.full(count, request.rope_variant)]))
            where[:count] = rows
            first_row += count
    return np.concatenate(found, axis=1)


def _kv_slots(chunk: PrefillChunk, block_size: int) -> np.ndarray:
    """int64 ``(groups, count)``: where the chunk's keys and values go."""
    end = chunk.start + chunk.count
    first = chunk.start // block_size
    blocks = np.array([group[first : -(-end // block_size)] for group in chunk.request.blocks], np.int64)
    index = np.arange(chunk.start, end)
    return blocks[:, index // block_size - first] * block_size + index % block_size


def _table_entries(batch: ScheduledBatch) -> np.ndarray:
    """int64 ``(4, n)`` rows of group, slot, column and block: all that the step changes in the tables.

    An entry may be listed twice, with the same block.
    """
    changes = [*batch.table_updates]
    for admission in batch.admitted:
        for group, blocks in enumerate(admission.request.blocks):
            changes.append(TableUpdate(admission.slot, 0, blocks, group))
    counts = [len(change.blocks) for change in changes]
    places = np.array([(change.group, change.slot) for change in changes], np.int64)
    columns = np.concatenate([np.arange(c.column, c.column + len(c.blocks)) for c in changes])
    entries = np.concatenate([np.array(change.blocks, np.int64) for change in changes])
    return np.stack([*np.repeat(places.T, counts, axis=1), columns, entries])
