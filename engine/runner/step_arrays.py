"""The arrays that a step brings from the host to the device, all in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat, takewhile

import numpy as np

from engine.kernels.step_inputs import HEADER, StepLayout
from engine.layers.rotary import Rotary
from engine.prompt import MediaSpan
from engine.request import Request, attributed_to
from engine.runner.draft_rows import draft_columns
from engine.scheduling.batch import PrefillChunk, ScheduledBatch, TableUpdate
from engine.structured.run_odds import ANY


@dataclass(slots=True)
class StepArrays:
    """The int64 arrays of a step that the device does not have yet.

    Attributes:
        changes: ``(2, M)``, targets and values of what changes in the block tables and in ``delta`` of
            :class:`~engine.runner.device_state.DeviceState`, see
            :func:`~engine.kernels.decode_state.write_changes`.
        inputs: ``(n,)``, see :class:`~engine.kernels.step_inputs.StepLayout`; empty if the step only
            decodes, in the slots of the last one.
        others: further arrays by name; those without content are left out:

            ``embedded_rows`` ``(E,)``: rows that embedding rows overwrite, span after span.

            ``forced`` ``(2, n)``: slots and tokens of answers that were not sampled; the first token of a
            chunk was.

            ``in_flight`` ``(3, E)``: of each expected chunk the index among the chunks' tokens of its first
            one, its slot, and the sequence's length before that token.

            ``choices`` ``(2, A, E)``: tokens that this first token may be, :data:`ANY` in the last row, and
            the lengths of the runs behind them.

            ``run_places`` ``(2, n)``: indices of the tokens behind the first ones, and the number of their
            expected chunk.

            ``runs`` ``(A, n)``: these tokens by choice.

            ``drafts`` ``(R, 2 + K)``: see :class:`~engine.runner.draft_rows.DraftRows`.

            ``long_prompts`` ``(3, n)``: arguments of :meth:`Rotary.write_prompt_rows`.

            ``vision``, ``text`` ``(n,)``: rows of prompts' tokens that the model has further experts for, and
            all other rows; left out if there are none of the first.

            ``sampled_vision``, ``sampled_text`` ``(n,)``: the same of rows that sample, counted among them.
    """

    changes: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.int64))
    inputs: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    others: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: ScheduledBatch,
        rotary: Rotary,
        layout: StepLayout,
        *,
        slots_known: bool,
        padding_slot: int,
        block_size: int,
        max_blocks: int,
        vision_tokens: Sequence[int] = (),
    ) -> StepArrays:
        """The arrays of ``batch``.

        Args:
            rotary: the model's; its tables give positions their rows.
            layout: of the step's inputs.
            slots_known: the device has the batch's sampling slots.
            padding_slot: what stands behind the sampling slots.
            block_size: tokens per KV block.
            max_blocks: columns of block tables.
            vision_tokens: ids of a prompt's tokens that the model has further experts for.

        Raises:
            RequestFault: what a request brings does not go together.
        """
        arrays = cls()
        if batch.admitted or batch.table_updates:
            arrays.changes = _changes(batch, rotary, layout.groups, padding_slot + 1, max_blocks)
        if slots_known:
            return arrays
        found = arrays.others
        chunks, sampling = batch.prefills, batch.sampling_slots
        decodes = len(batch.decode_slots)
        tokens = batch.num_tokens - decodes
        inputs = np.empty(layout.length(tokens, len(chunks), len(sampling) - decodes), np.int64)
        front = inputs[: layout.chunks]
        front[:4] = decodes, len(chunks), tokens, len(sampling)
        front[HEADER : HEADER + len(sampling)] = sampling
        front[HEADER + len(sampling) :] = padding_slot
        arrays.inputs = inputs
        if chunks:
            rows = arrays._add_chunks(batch, rotary, layout, block_size)
            if vision_tokens:
                found |= _modalities(batch, vision_tokens, rows)
            arrays.others = {name: array for name, array in found.items() if array.size}
        return arrays

    def _add_chunks(
        self, batch: ScheduledBatch, rotary: Rotary, layout: StepLayout, block_size: int
    ) -> np.ndarray:
        """Fill the inputs of the chunks of ``batch``, and set the others that they need; see :meth:`of`.

        A prompt's step waits for this: each call of numpy costs more than what it does.

        Returns:
            The rows that sample behind those of decodes.
        """
        chunks, decodes, found = batch.prefills, len(batch.decode_slots), self.others
        slots, firsts, ends, counted = ([0] * len(chunks) for _ in range(4))
        rows: list[int] = []
        behind = 0
        for number, chunk in enumerate(chunks):
            sampling, end = chunk.sampling_rows, chunk.start + chunk.count
            slots[number], firsts[number] = chunk.slot, behind
            ends[number], counted[number] = end, end - sampling
            behind += chunk.count
            rows.extend(range(decodes + behind - sampling, decodes + behind))
        heads, ids, positions, kv_slots, key_ends, sampled = layout.parts(self.inputs, len(chunks), behind)
        heads[:] = slots + firsts + ends + counted
        sampled[:] = rows
        embedded: list[np.ndarray] = []
        answers = list(takewhile(lambda chunk: chunk.answer is not None, chunks))
        done = 0
        if answers:
            done = sum(chunk.count for chunk in answers)
            ids[:done], positions[:, :done], kv_slots[:, :done] = _answer_arrays(answers, rotary, block_size)
        for chunk, row in islice(chunk_rows(batch), len(answers), None):
            with attributed_to(chunk.request):
                own = slice(done, done + chunk.count)
                done += chunk.count
                tokens = ids[own]
                tokens[:] = chunk.request.ids[chunk.start : chunk.start + chunk.count]
                _write_positions(positions[:, own], chunk, rotary)
                _write_kv_slots(kv_slots[:, own], chunk, block_size)
                for span in chunk.request.spans:
                    first, last, places = span_rows(span, chunk.start, chunk.start + chunk.count)
                    if last > first:
                        tokens[places] = -1 - tokens[places]
                        embedded.append(places + row)
        if layout.both_ways:
            key_ends[:] = np.concatenate([_key_ends(chunk) for chunk in chunks])
        if embedded:
            found["embedded_rows"] = np.concatenate(embedded)
        if answers:
            found["forced"] = forced_tokens(answers)
            found |= _expected_arrays(list(takewhile(lambda chunk: chunk.expected is not None, answers)))
            found["drafts"] = draft_columns(batch)
        if rotary.first_prompt_row:
            found["long_prompts"] = _long_prompts(chunks, positions, rotary.first_prompt_row)
        return sampled


def _modalities(
    batch: ScheduledBatch, vision_tokens: Sequence[int], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of :class:`StepArrays` about ``vision_tokens``; generated tokens count as others."""
    is_vision = np.zeros(batch.num_tokens, bool)
    for chunk, row in chunk_rows(batch):
        of_prompt = chunk.token_ids[: max(chunk.request.num_prompt - chunk.start, 0)]
        is_vision[row : row + len(of_prompt)] = np.isin(of_prompt, vision_tokens)
    if not is_vision.any():
        return {}
    sampled = is_vision[np.concatenate([np.arange(len(batch.decode_slots)), rows])]
    return {
        "vision": is_vision.nonzero()[0],
        "text": (~is_vision).nonzero()[0],
        "sampled_vision": sampled.nonzero()[0],
        "sampled_text": (~sampled).nonzero()[0],
    }


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
    """Ids, positions and places in KV memory, as :class:`StepArrays` has them, of chunks of answers: many
    short ones."""
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    deltas = np.array([_delta(chunk.request, rotary) for chunk in chunks], np.int64)
    index = np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)
    positions = index + np.repeat(deltas, counts)
    if rotary.rope.mrope_section:
        positions = np.broadcast_to(positions, (rotary.rope.num_axes, len(positions)))
    ids = np.array([token for chunk in chunks for token in chunk.token_ids], np.int64)
    columns, blocks = (index // block_size).tolist(), []
    for group in range(len(chunks[0].request.blocks)):
        rows = [held for chunk in chunks for held in repeat(chunk.request.blocks[group], chunk.count)]
        blocks.append([held[column] for held, column in zip(rows, columns, strict=True)])
    return ids, positions, np.array(blocks, np.int64) * block_size + index % block_size


def _write_positions(to: np.ndarray, chunk: PrefillChunk, rotary: Rotary) -> None:
    """Write the rows of the rotary tables of a chunk's tokens ``(axes, count)``."""
    request, delta = chunk.request, _delta(chunk.request, rotary)
    known = 0
    if rotary.rope.mrope_section and request.positions is not None:
        inside = request.positions[:, chunk.start : chunk.start + chunk.count]
        known = inside.shape[1]
        to[:, :known] = inside
    if known < chunk.count:
        to[:, known:] = np.arange(chunk.start + known + delta, chunk.start + chunk.count + delta)


def _key_ends(chunk: PrefillChunk) -> np.ndarray:
    """int64 ``(count,)``: where the keys end that each token of a chunk sees."""
    own = np.arange(chunk.start + 1, chunk.start + chunk.count + 1)
    ends = own.copy()
    for start, stop in chunk.request.both_ways:
        ends[max(start - chunk.start, 0) : max(stop - chunk.start, 0)] = stop
    for start, stop in chunk.request.one_way:
        inside = slice(max(start - chunk.start, 0), max(stop - chunk.start, 0))
        ends[inside] = own[inside]
    return ends


def _expected_arrays(chunks: Sequence[PrefillChunk]) -> dict[str, np.ndarray]:
    """The arrays of :class:`StepArrays` about the expected ``chunks``."""
    if not chunks:
        return {}
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
    slots, lengths = [chunk.slot for chunk in chunks], [chunk.start for chunk in chunks]
    return {
        "in_flight": np.array([firsts, slots, lengths], np.int64),
        "choices": choices,
        "run_places": places[:, behind],
        "runs": runs[:, behind],
    }


def forced_tokens(chunks: Sequence[PrefillChunk]) -> np.ndarray:
    """int64 ``(2, n)``: see :class:`StepArrays`."""
    runs = [c for c in chunks if c.answer is not None and not c.num_drafted and c.expected is None]
    found = [(chunk.slot, token) for chunk in runs for token in chunk.token_ids[1:]]
    return np.array(found, np.int64).reshape(-1, 2).T


def _long_prompts(chunks: Sequence[PrefillChunk], positions: np.ndarray, first_row: int) -> np.ndarray:
    """Assign reserved rows of the rotary tables to prompt tokens whose frequencies depend on their prompt's
    length.

    Args:
        positions: of the chunks' tokens ``(1, P)``; the assigned rows are written in place of some.
        first_row: the first reserved row.

    Returns:
        int64 ``(3, n)``: the rows, and the positions and prompt lengths to fill them for.
    """
    found, behind = [np.zeros((3, 0), np.int64)], 0
    for chunk in chunks:
        request, where = chunk.request, positions[0, behind : behind + chunk.count]
        behind += chunk.count
        count = 0 if chunk.answer is not None else min(request.num_prompt - chunk.start, chunk.count)
        if request.rope_variant and count > 0:
            rows = np.arange(first_row, first_row + count)
            found.append(np.stack([rows, where[:count], np.full(count, request.rope_variant)]))
            where[:count] = rows
            first_row += count
    return np.concatenate(found, axis=1)


def _write_kv_slots(to: np.ndarray, chunk: PrefillChunk, block_size: int) -> None:
    """Write where the chunk's keys and values go, ``(groups, count)``."""
    end = chunk.start + chunk.count
    first = chunk.start // block_size
    index = np.arange(chunk.start, end)
    columns, offsets = index // block_size - first, index % block_size
    for group, held in enumerate(chunk.request.blocks):
        starts = np.array(held[first : -(-end // block_size)], np.int64) * block_size
        np.add(starts[columns], offsets, out=to[group])


def _changes(
    batch: ScheduledBatch, rotary: Rotary, num_groups: int, num_rows: int, max_blocks: int
) -> np.ndarray:
    """The changes of :class:`StepArrays`, in tables of ``num_rows`` rows."""
    targets: list[int] = []
    values: list[int] = []
    updates = [*batch.table_updates]
    for admission in batch.admitted:
        for group, blocks in enumerate(admission.request.blocks):
            updates.append(TableUpdate(admission.slot, 0, blocks, group))
        # Behind all tables.
        targets.append(num_groups * num_rows * max_blocks + admission.slot)
        values.append(_delta(admission.request, rotary))
    for update in updates:
        first = (update.group * num_rows + update.slot) * max_blocks + update.column
        targets.extend(range(first, first + len(update.blocks)))
        values.extend(update.blocks)
    return np.array([targets, values], np.int64)
