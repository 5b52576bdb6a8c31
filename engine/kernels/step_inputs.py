"""Inputs of a step with prompt chunks: rows of running answers from the device's own state, rows of chunks from
arrays of the host, padding behind them. One kernel, so that a captured pass gathers its inputs itself.

A request slot is the row of one running request in the state tensors; a KV slot is the index of one token in
the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata

#: Numbers at the front of a step's arrays, see :class:`StepLayout`.
HEADER = 8


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the arrays of a step with D decoding rows, C chunks of P tokens and R sampling rows lie one after
    the other in one int64 array.

    ===============  ==============  ===================================================================
    part             shape           content
    ===============  ==============  ===================================================================
    header           ``(8,)``        D, C, P, R
    sampling slots   ``(slots,)``    request slots of the sampling rows, decoding rows first
    chunks           ``(4, C)``      request slot, first row of the chunk among the P, tokens of the sequence
                                     behind the chunk, and how many of them count as computed without a token
                                     sampled behind them
    ids              ``(P,)``        tokens; -1 minus the token where an embedding row of media stands
    positions        ``(axes, P)``   rows of the rotary tables
    KV slots         ``(groups, P)``  where keys and values go, for each group of layers
    key ends         ``(P,)``        only with ``both_ways``
    rows             ``(R - D,)``    rows that sample, behind the decoding ones
    ===============  ==============  ===================================================================

    Attributes:
        num_slots: request slots.
        groups: groups of layers.
        axes: of positions: 3 or 4 with M-RoPE, else 1.
        both_ways: see :attr:`engine.kernels.paged.AttentionMetadata.key_ends`.
    """

    num_slots: int
    groups: int
    axes: int
    both_ways: bool

    @property
    def chunks(self) -> int:
        """Where the chunks begin."""
        return HEADER + self.num_slots

    def length(self, tokens: int, chunks: int, rows: int) -> int:
        """Return the numbers of a step with P ``tokens`` in C ``chunks``, and R - D ``rows``."""
        return self.chunks + 4 * chunks + (1 + self.axes + self.groups + self.both_ways) * tokens + rows

    def parts(self, step: np.ndarray, chunks: int, tokens: int) -> list[np.ndarray]:
        """Return views of the parts of ``step`` from the chunks on: those ``(4 C,)``, ids, positions, KV slots, key
        ends, and rows. Key ends are empty without ``both_ways``."""
        ids = self.chunks + 4 * chunks
        positions = ids + tokens
        kv_slots = positions + self.axes * tokens
        key_ends = kv_slots + self.groups * tokens
        rows = key_ends + self.both_ways * tokens
        return [
            step[self.chunks : ids],
            step[ids:positions],
            step[positions:kv_slots].reshape(self.axes, tokens),
            step[kv_slots:key_ends].reshape(self.groups, tokens),
            step[key_ends:rows],
            step[rows:],
        ]

    def expected(
        self, step: torch.Tensor, chunks: int, tokens: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the ids ``(P,)``, and for the first ``count`` chunks, each of which samples once, of the
        computed tokens and of the sampling rows."""
        ids = self.chunks + 4 * chunks
        counted, rows = ids - chunks, ids + (1 + self.axes + self.groups + self.both_ways) * tokens
        return step[ids : ids + tokens], step[counted : counted + count], step[rows : rows + count]

    def size(self, tokens: int) -> int:
        """Return the most numbers of a step with ``tokens`` rows."""
        return self.length(tokens, self.num_slots, self.num_slots)


class StepState(NamedTuple):
    """State of N request slots; see :class:`engine.runner.device_state.DeviceState`.

    Attributes:
        block_tables: int32 ``(groups, N, max_blocks)`` contiguous.
        last_token, length, delta: int64 ``(N,)``.
        block_size: tokens per block.
        padding_slot: slot of padding sequences.
    """

    block_tables: torch.Tensor
    last_token: torch.Tensor
    length: torch.Tensor
    delta: torch.Tensor
    block_size: int
    padding_slot: int


@dataclass(slots=True)
class StepInputs:
    """Inputs of a forward pass over T rows of S sequences, of which up to R sample. Names and dtypes are those
    of :class:`engine.kernels.paged.AttentionMetadata` where it has them.

    Attributes:
        ids: int64 ``(T,)``.
        is_media: bool ``(T,)``, true where an embedding row of media stands for the token.
        positions: int64 ``(axes, T)``.
        slot_mapping: int64 ``(groups, T)``.
        key_ends: int32 ``(T,)``.
        block_tables: int32 ``(groups, S, max_blocks)``.
        query_start: int32 ``(S + 1,)``.
        seq_lens: int32 ``(S,)``.
        state_rows: int64 ``(S,)``.
        rows: int64 ``(R,)``, rows that sample; 0 behind them.
    """

    ids: torch.Tensor
    is_media: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    key_ends: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    state_rows: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def zeros(
        cls, layout: StepLayout, tokens: int, sequences: int, rows: int, max_blocks: int, device: torch.device
    ) -> StepInputs:
        """Room for ``tokens``, ``sequences`` and sampling ``rows``."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(tokens),
            zeros(tokens, dtype=torch.bool),
            zeros(layout.axes, tokens),
            zeros(layout.groups, tokens),
            zeros(tokens, dtype=torch.int32),
            zeros(layout.groups, sequences, max_blocks, dtype=torch.int32),
            zeros(sequences + 1, dtype=torch.int32),
            zeros(sequences, dtype=torch.int32),
            zeros(sequences),
            zeros(rows),
        )

    def metadata(
        self,
        *,
        max_query_len: int,
        max_seq_len: int,
        both_ways: bool,
        gaps: bool,
        many_sequences: bool = False,
    ) -> AttentionMetadata:
        """The same tensors as attention takes them; arguments as there."""
        return AttentionMetadata(
            block_tables=self.block_tables,
            query_start=self.query_start,
            seq_lens=self.seq_lens,
            slot_mapping=self.slot_mapping,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            key_ends=self.key_ends if both_ways else None,
            gaps=gaps,
            state_rows=self.state_rows,
            many_sequences=many_sequences,
        )

    def front(self, tokens: int, sequences: int) -> StepInputs:
        """Views of the first ``tokens``, ``sequences`` and as many sampling rows."""
        return StepInputs(
            self.ids[:tokens],
            self.is_media[:tokens],
            self.positions[:, :tokens],
            self.slot_mapping[:, :tokens],
            self.key_ends[:tokens],
            self.block_tables[:, :sequences],
            self.query_start[: sequences + 1],
            self.seq_lens[:sequences],
            self.state_rows[:sequences],
            self.rows[:sequences],
        )


def gather_step_inputs(step: torch.Tensor, layout: StepLayout, state: StepState, inputs: StepInputs) -> None:
    """Fill ``inputs``, and count the chunks' tokens as computed in ``state.length``, but for those behind which
    a token is sampled: these count when it is.

    Behind the rows of the step are padding rows, which write no keys, and padding sequences without tokens.

    Args:
        step: int64, see :class:`StepLayout`; may be longer.
        inputs: as large as the step, or larger.
    """
    run = gather_step_inputs_triton if use_triton(step) else gather_step_inputs_reference
    run(step, layout, state, inputs)


def gather_step_inputs_reference(step, layout, state, inputs) -> None:
    # Without a look at any number, so that the work can be captured.
    decodes, chunks, tokens, sampling = step[:4].unbind()
    per_chunk = layout.chunks
    per_token = per_chunk + 4 * chunks
    device, last = step.device, len(step) - 1

    def found(places: torch.Tensor, valid: torch.Tensor, other: torch.Tensor | int) -> torch.Tensor:
        return torch.where(valid, step[places.clamp(0, last)], other)

    # Sequences.
    seq = torch.arange(len(inputs.seq_lens), device=device)
    decoding, chunk = seq < decodes, seq - decodes
    chunked = ~decoding & (chunk < chunks)
    slots = found(HEADER + seq, decoding, found(per_chunk + chunk, chunked, state.padding_slot))
    computed = state.length[slots]
    ends = torch.where(decoding, computed + 1, found(per_chunk + 2 * chunks + chunk, chunked, 0))
    starts = torch.where(decoding, seq, decodes + found(per_chunk + chunks + chunk, chunked, tokens))
    counted = found(per_chunk + 3 * chunks + chunk, chunked, computed)
    state.length.index_copy_(0, slots, torch.where(slots == state.padding_slot, state.length[slots], counted))
    inputs.seq_lens.copy_(ends)
    inputs.query_start.copy_(torch.cat([starts, (decodes + tokens)[None]]))
    inputs.state_rows.copy_(slots)
    inputs.block_tables.copy_(state.block_tables.index_select(1, slots))
    # Rows.
    row = torch.arange(len(inputs.ids), device=device)
    decoding, token = row < decodes, row - decodes
    given = ~decoding & (token < tokens)
    slots = found(HEADER + row, decoding, state.padding_slot)
    computed = state.length[slots]
    ids = torch.where(decoding, state.last_token[slots], found(per_token + token, given, 0))
    inputs.is_media.copy_(ids < 0)
    inputs.ids.copy_(torch.where(ids < 0, -1 - ids, ids))
    at = per_token + tokens
    for axis in range(layout.axes):
        positions = found(at + axis * tokens + token, given, 0)
        inputs.positions[axis] = torch.where(decoding, computed + state.delta[slots], positions)
    at = at + layout.axes * tokens
    for group in range(layout.groups):
        block = state.block_tables[group, slots, computed // state.block_size].long()
        own = block * state.block_size + computed % state.block_size
        places = found(at + group * tokens + token, given, -1)
        inputs.slot_mapping[group] = torch.where(decoding, own, places)
    at = at + layout.groups * tokens
    if layout.both_ways:
        inputs.key_ends.copy_(torch.where(decoding, computed + 1, found(at + token, given, 0)))
        at = at + tokens
    row = torch.arange(len(inputs.rows), device=device)
    inputs.rows.copy_(torch.where(row < decodes, row, found(at + row - decodes, row < sampling, 0)))


def gather_step_inputs_triton(step, layout, state, inputs) -> None:
    groups, num_slots, blocks = state.block_tables.shape
    tokens, sequences, rows = len(inputs.ids), len(inputs.seq_lens), len(inputs.rows)
    of_rows = max(sequences, rows)
    assert state.block_tables.is_contiguous() and inputs.block_tables.stride()[1:] == (blocks, 1)
    assert inputs.positions.stride(1) == inputs.slot_mapping.stride(1) == 1
    launch(
        _inputs_kernel, (of_rows * groups + triton.cdiv(tokens, 256),),
        step_ptr=step, block_tables_ptr=state.block_tables, last_token_ptr=state.last_token,
        length_ptr=state.length, delta_ptr=state.delta,
        ids_ptr=inputs.ids, is_media_ptr=inputs.is_media.view(torch.uint8), positions_ptr=inputs.positions,
        slot_mapping_ptr=inputs.slot_mapping, key_ends_ptr=inputs.key_ends, tables_ptr=inputs.block_tables,
        query_start_ptr=inputs.query_start, seq_lens_ptr=inputs.seq_lens,
        state_rows_ptr=inputs.state_rows, rows_ptr=inputs.rows,
        chunks_at=layout.chunks, blocks=blocks, num_slots=num_slots, padding_slot=state.padding_slot,
        max_tokens=tokens, max_sequences=sequences, max_rows=rows, of_rows=of_rows,
        positions_stride=inputs.positions.stride(0), slots_stride=inputs.slot_mapping.stride(0),
        tables_stride=inputs.block_tables.stride(0),
        BLOCK_SIZE=state.block_size, AXES=layout.axes, GROUPS=groups, BOTH_WAYS=layout.both_ways,
        COLUMNS=min(256, triton.next_power_of_2(blocks)), TOKENS=256, HEADER=HEADER,
    )  # fmt: skip


# Sizes differ between captured passes; specialising on them would compile the kernel again at start-up.
@triton.jit(
    do_not_specialize=[
        "chunks_at", "blocks", "num_slots", "padding_slot", "max_tokens", "max_sequences", "max_rows", "of_rows",
        "positions_stride", "slots_stride", "tables_stride",
    ]
)  # fmt: skip
def _inputs_kernel(
    step_ptr, block_tables_ptr, last_token_ptr, length_ptr, delta_ptr,
    ids_ptr, is_media_ptr, positions_ptr, slot_mapping_ptr, key_ends_ptr, tables_ptr,
    query_start_ptr, seq_lens_ptr, state_rows_ptr, rows_ptr,
    chunks_at, blocks, num_slots, padding_slot, max_tokens, max_sequences, max_rows, of_rows,
    positions_stride, slots_stride, tables_stride,
    BLOCK_SIZE: tl.constexpr, AXES: tl.constexpr, GROUPS: tl.constexpr, BOTH_WAYS: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADER: tl.constexpr,
):  # fmt: skip
    """First one program per sequence or sampling row and group of layers, then one per ``TOKENS`` rows."""
    program = tl.program_id(0)
    decodes, chunks, tokens = tl.load(step_ptr), tl.load(step_ptr + 1), tl.load(step_ptr + 2)
    sampling, chunk_ptr = tl.load(step_ptr + 3), step_ptr + chunks_at
    ids_from = chunk_ptr + 4 * chunks
    positions_from = ids_from + tokens
    slots_from = positions_from + AXES * tokens
    ends_from = slots_from + GROUPS * tokens
    rows_from = ends_from
    if BOTH_WAYS:
        rows_from += tokens
    if program < of_rows * GROUPS:
        seq, group = (program % of_rows).to(tl.int64), (program // of_rows).to(tl.int64)
        if group == 0:
            if seq < max_rows:
                row = seq
                if seq >= decodes:
                    row = tl.load(rows_from + seq - decodes, mask=seq < sampling, other=0)
                tl.store(rows_ptr + seq, row)
        if seq < max_sequences:
            slot, start = tl.cast(padding_slot, tl.int64), decodes + tokens
            end = start * 0
            if seq < decodes:
                slot, start = tl.load(step_ptr + HEADER + seq), seq
                length = tl.load(length_ptr + slot)
                end = length + 1
            elif seq < decodes + chunks:
                chunk = chunk_ptr + seq - decodes
                slot = tl.load(chunk)
                start = decodes + tl.load(chunk + chunks)
                end = tl.load(chunk + 2 * chunks)
            source = block_tables_ptr + (group * num_slots + slot) * blocks
            target = tables_ptr + group * tables_stride + seq * blocks
            # Entries beyond the sequence are never read.
            used = tl.minimum((end + BLOCK_SIZE - 1) // BLOCK_SIZE, blocks)
            for first in range(0, used, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mask = column < used
                tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)
            if seq < decodes:
                index = end - 1
                block = tl.load(source + index // BLOCK_SIZE).to(tl.int64)
                place = slot_mapping_ptr + group * slots_stride + seq
                tl.store(place, block * BLOCK_SIZE + index % BLOCK_SIZE)
            if group == 0:
                tl.store(query_start_ptr + seq, start.to(tl.int32))
                tl.store(seq_lens_ptr + seq, end.to(tl.int32))
                tl.store(state_rows_ptr + seq, slot)
                if seq == max_sequences - 1:
                    tl.store(query_start_ptr + max_sequences, (decodes + tokens).to(tl.int32))
                if seq < decodes:
                    tl.store(ids_ptr + seq, tl.load(last_token_ptr + slot))
                    tl.store(is_media_ptr + seq, tl.full((), 0, tl.uint8))
                    position = end - 1 + tl.load(delta_ptr + slot)
                    for axis in tl.static_range(AXES):
                        tl.store(positions_ptr + axis * positions_stride + seq, position)
                    if BOTH_WAYS:
                        tl.store(key_ends_ptr + seq, end.to(tl.int32))
                elif seq < decodes + chunks:
                    tl.store(length_ptr + slot, tl.load(chunk_ptr + 3 * chunks + seq - decodes))
    else:
        row = ((program - of_rows * GROUPS) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        token = row - decodes
        mask, given = (row < max_tokens) & (token >= 0), (token >= 0) & (token < tokens)
        ids = tl.load(ids_from + token, mask=given, other=0)
        tl.store(ids_ptr + row, tl.where(ids < 0, -1 - ids, ids), mask=mask)
        tl.store(is_media_ptr + row, (ids < 0).to(tl.uint8), mask=mask)
        for axis in tl.static_range(AXES):
            position = tl.load(positions_from + axis * tokens + token, mask=given, other=0)
            tl.store(positions_ptr + axis * positions_stride + row, position, mask=mask)
        for group in tl.static_range(GROUPS):
            place = tl.load(slots_from + group * tokens + token, mask=given, other=-1)
            tl.store(slot_mapping_ptr + group * slots_stride + row, place, mask=mask)
        if BOTH_WAYS:
            end = tl.load(ends_from + token, mask=given, other=0)
            tl.store(key_ends_ptr + row, end.to(tl.int32), mask=mask)
