"""What a decode step reads of the running requests' state, and how it moves on, a launch each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch


class DecodePlaces(NamedTuple):
    """Of ``D`` decoding rows.

    Attributes:
        ids: int64 ``(D,)``, tokens that are to be computed.
        tables: int32 ``(D, max_blocks)``.
        seq_lens: int32 ``(D,)``, tokens once these are computed.
        kv_slots: int64 ``(D,)``, where their keys and values go.
        positions: int64 ``(D,)``, their rotary positions.
    """

    ids: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor
    kv_slots: torch.Tensor
    positions: torch.Tensor


def decode_places(
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    delta: torch.Tensor,
    *,
    block_size: int,
) -> DecodePlaces:
    """Gather the state of some slots.

    Args:
        slots: int64 ``(D,)``.
        block_tables: int32 ``(N, max_blocks)`` contiguous, blocks of each slot.
        last_token: int64 ``(N,)``, sampled last and not computed yet.
        length: int64 ``(N,)``, computed tokens; less than ``max_blocks * block_size``.
        delta: int64 ``(N,)``, rotary position minus index of the next token.
        block_size: tokens per block.
    """
    run = decode_places_triton if use_triton(slots) else decode_places_reference
    return run(slots, block_tables, last_token, length, delta, block_size=block_size)


def decode_places_reference(slots, block_tables, last_token, length, delta, *, block_size) -> DecodePlaces:
    tables, computed = block_tables.index_select(0, slots), length.index_select(0, slots)
    block = tables.gather(1, (computed // block_size)[:, None]).squeeze(1)
    return DecodePlaces(
        last_token.index_select(0, slots),
        tables,
        (computed + 1).int(),
        block.long() * block_size + computed % block_size,
        computed + delta.index_select(0, slots),
    )


def decode_places_triton(slots, block_tables, last_token, length, delta, *, block_size) -> DecodePlaces:
    rows, blocks = slots.shape[0], block_tables.shape[1]
    assert slots.is_contiguous() and block_tables.is_contiguous()
    device = slots.device
    ids, kv_slots, positions = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(3))
    tables = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    seq_lens = torch.empty(rows, dtype=torch.int32, device=device)
    if rows:
        launch(
            _places_kernel,
            (rows,),
            slots,
            block_tables,
            last_token,
            length,
            delta,
            ids,
            tables,
            seq_lens,
            kv_slots,
            positions,
            blocks,
            BLOCK_SIZE=block_size,
            COLUMNS=min(1024, triton.next_power_of_2(blocks)),
        )
    return DecodePlaces(ids, tables, seq_lens, kv_slots, positions)


@triton.jit
def _places_kernel(
    slots_ptr,
    block_tables_ptr,
    last_token_ptr,
    length_ptr,
    delta_ptr,
    ids_ptr,
    tables_ptr,
    seq_lens_ptr,
    kv_slots_ptr,
    positions_ptr,
    blocks,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    length = tl.load(length_ptr + slot)
    source, target = block_tables_ptr + slot * blocks, tables_ptr + row * blocks
    for first in range(0, blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < blocks
        tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)
    block = tl.load(source + length // BLOCK_SIZE).to(tl.int64)
    tl.store(ids_ptr + row, tl.load(last_token_ptr + slot))
    tl.store(seq_lens_ptr + row, (length + 1).to(tl.int32))
    tl.store(kv_slots_ptr + row, block * BLOCK_SIZE + length % BLOCK_SIZE)
    tl.store(positions_ptr + row, length + tl.load(delta_ptr + slot))


def advance(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    *,
    padding_slot: int,
) -> None:
    """Count the last tokens of some slots as computed; ``tokens`` come next.

    Args:
        slots, tokens: int64 ``(D,)``; no slot but the padding twice.
        last_token, length: int64 ``(N,)``, changed in place; see :func:`decode_places`.
        padding_slot: whose length stays what it is.
    """
    run = advance_triton if use_triton(slots) else advance_reference
    run(slots, tokens, last_token, length, padding_slot=padding_slot)


def advance_reference(slots, tokens, last_token, length, *, padding_slot) -> None:
    last_token.index_copy_(0, slots, tokens)
    length.index_copy_(0, slots, length.index_select(0, slots) + (slots != padding_slot))


def advance_triton(slots, tokens, last_token, length, *, padding_slot) -> None:
    assert slots.is_contiguous() and tokens.is_contiguous()
    rows = slots.shape[0]
    if rows:
        launch(
            _advance_kernel,
            (triton.cdiv(rows, 256),),
            slots,
            tokens,
            last_token,
            length,
            padding_slot,
            rows,
            ROWS=256,
        )


# Batch sizes differ in this number; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["rows"])
def _advance_kernel(
    slots_ptr, tokens_ptr, last_token_ptr, length_ptr, padding_slot, rows, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    slot = tl.load(slots_ptr + row, mask=mask, other=0)
    tl.store(last_token_ptr + slot, tl.load(tokens_ptr + row, mask=mask), mask=mask)
    mask = mask & (slot != padding_slot)
    tl.store(length_ptr + slot, tl.load(length_ptr + slot, mask=mask) + 1, mask=mask)
