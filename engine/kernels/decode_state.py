"""Kernels over per-slot state: one writes what the host has changed, one gathers a decode step's inputs, one
advances the state afterwards.

A request slot is the row of one running request in the state tensors; a KV slot is the index of one token in
the KV cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch


class DecodeInputs(NamedTuple):
    """Inputs of a decode step of ``D`` requests, one row per request.

    Attributes:
        ids: int64 ``(D,)``, token ids to compute.
        tables: int32 ``(groups, D, max_blocks)``, block tables of each group of layers.
        seq_lens: int32 ``(D,)``, tokens of each sequence including these.
        kv_slots: int64 ``(groups, D)``, where their keys and values go.
        positions: int64 ``(D,)``, their rotary positions.
    """

    ids: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor
    kv_slots: torch.Tensor
    positions: torch.Tensor


def gather_decode_inputs(
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    delta: torch.Tensor,
    *,
    block_size: int,
) -> DecodeInputs:
    """Gather a decode step's inputs from the state of some request slots.

    Args:
        slots: int64 ``(D,)``, request slots.
        block_tables: int32 ``(groups, N, max_blocks)`` contiguous, KV blocks of each slot.
        last_token: int64 ``(N,)``, sampled last and not computed yet.
        length: int64 ``(N,)``, computed tokens; less than ``max_blocks * block_size``.
        delta: int64 ``(N,)``, rotary position minus index of the next token.
        block_size: tokens per block.
    """
    run = gather_decode_inputs_triton if use_triton(slots) else gather_decode_inputs_reference
    return run(slots, block_tables, last_token, length, delta, block_size=block_size)


def gather_decode_inputs_reference(
    slots, block_tables, last_token, length, delta, *, block_size
) -> DecodeInputs:
    tables, computed = block_tables.index_select(1, slots), length.index_select(0, slots)
    column = (computed // block_size).expand(len(tables), -1)[..., None]
    block = tables.gather(2, column).squeeze(2)
    return DecodeInputs(
        last_token.index_select(0, slots),
        tables,
        (computed + 1).int(),
        block.long() * block_size + computed % block_size,
        computed + delta.index_select(0, slots),
    )


def gather_decode_inputs_triton(
    slots, block_tables, last_token, length, delta, *, block_size
) -> DecodeInputs:
    rows, (groups, num_slots, blocks) = slots.shape[0], block_tables.shape
    assert slots.is_contiguous() and block_tables.is_contiguous()
    device = slots.device
    ids, positions = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    kv_slots = torch.empty((groups, rows), dtype=torch.int64, device=device)
    tables = torch.empty((groups, rows, blocks), dtype=torch.int32, device=device)
    seq_lens = torch.empty(rows, dtype=torch.int32, device=device)
    if rows:
        launch(
            _gather_kernel, (rows, groups),
            slots_ptr=slots, block_tables_ptr=block_tables, last_token_ptr=last_token, length_ptr=length,
            delta_ptr=delta, ids_ptr=ids, tables_ptr=tables, seq_lens_ptr=seq_lens, kv_slots_ptr=kv_slots,
            positions_ptr=positions, blocks=blocks, num_slots=num_slots,
            BLOCK_SIZE=block_size, COLUMNS=min(1024, triton.next_power_of_2(blocks)),
        )  # fmt: skip
    return DecodeInputs(ids, tables, seq_lens, kv_slots, positions)


@triton.jit
def _gather_kernel(
    slots_ptr, block_tables_ptr, last_token_ptr, length_ptr, delta_ptr,
    ids_ptr, tables_ptr, seq_lens_ptr, kv_slots_ptr, positions_ptr,
    blocks, num_slots, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per request and group of layers; those of the first group write what groups share."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    length = tl.load(length_ptr + slot)
    target_row = group * tl.num_programs(0) + row
    source, target = block_tables_ptr + (group * num_slots + slot) * blocks, tables_ptr + target_row * blocks
    for first in range(0, blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < blocks
        tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)
    block = tl.load(source + length // BLOCK_SIZE).to(tl.int64)
    tl.store(kv_slots_ptr + target_row, block * BLOCK_SIZE + length % BLOCK_SIZE)
    if group == 0:
        tl.store(ids_ptr + row, tl.load(last_token_ptr + slot))
        tl.store(seq_lens_ptr + row, (length + 1).to(tl.int32))
        tl.store(positions_ptr + row, length + tl.load(delta_ptr + slot))


def advance(
    slots: torch.Tensor, tokens: torch.Tensor, last_token: torch.Tensor, length: torch.Tensor,
    *, padding_slot: int,
) -> None:  # fmt: skip
    """Count the last tokens of some request slots as computed; ``tokens`` come next.

    Args:
        slots: int64 ``(D,)``; no slot appears twice, except the padding slot.
        tokens: int64 ``(D,)``; -1, of a request that ends, becomes 0, which the embedding has.
        last_token, length: int64 ``(N,)``, changed in place; see :func:`gather_decode_inputs`.
        padding_slot: slot of padding rows; its length stays.
    """
    run = advance_triton if use_triton(slots) else advance_reference
    run(slots, tokens, last_token, length, padding_slot=padding_slot)


def advance_reference(slots, tokens, last_token, length, *, padding_slot) -> None:
    last_token.index_copy_(0, slots, tokens.clamp(min=0))
    length.index_copy_(0, slots, length.index_select(0, slots) + (slots != padding_slot))


def advance_triton(slots, tokens, last_token, length, *, padding_slot) -> None:
    assert slots.is_contiguous() and tokens.is_contiguous()
    rows = slots.shape[0]
    if rows:
        launch(
            _advance_kernel, (triton.cdiv(rows, 256),),
            slots_ptr=slots, tokens_ptr=tokens, last_token_ptr=last_token, length_ptr=length,
            padding_slot=padding_slot, rows=rows, ROWS=256,
        )  # fmt: skip


# ``rows`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows"])
def _advance_kernel(
    slots_ptr, tokens_ptr, last_token_ptr, length_ptr, padding_slot, rows, ROWS: tl.constexpr
):  # fmt: skip
    """One program per ``ROWS`` requests."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    slot = tl.load(slots_ptr + row, mask=mask, other=0)
    token = tl.maximum(tl.load(tokens_ptr + row, mask=mask), 0)
    tl.store(last_token_ptr + slot, token, mask=mask)
    mask = mask & (slot != padding_slot)
    tl.store(length_ptr + slot, tl.load(length_ptr + slot, mask=mask) + 1, mask=mask)


def write_changes(changes: torch.Tensor, block_tables: torch.Tensor, delta: torch.Tensor) -> None:
    """Write what the host has changed in the state of request slots. Capturable: how much it is, is read on the
    device.

    Args:
        changes: int64 ``(C,)``. The last number is a count n; before it are n targets and then n values. Targets
            are places in the block tables, counted through, and behind those the slots of ``delta``. A target may
            come twice, with the same value.
        block_tables: int32 ``(groups, N, max_blocks)`` contiguous, changed in place.
        delta: int64 ``(N,)``, changed in place; see :func:`gather_decode_inputs`.
    """
    run = write_changes_triton if use_triton(changes) else write_changes_reference
    run(changes, block_tables, delta)


def write_changes_reference(changes, block_tables, delta) -> None:
    last = len(changes) - 1
    count, size = int(changes[last]), block_tables.numel()
    targets, values = changes[last - 2 * count : last].view(2, count)
    in_tables = targets < size
    block_tables.view(-1).index_copy_(0, targets[in_tables], values[in_tables].int())
    delta.index_copy_(0, targets[~in_tables] - size, values[~in_tables])


def write_changes_triton(changes, block_tables, delta) -> None:
    assert changes.is_contiguous() and block_tables.is_contiguous() and delta.is_contiguous()
    launch(
        _changes_kernel, (8,),
        changes_ptr=changes, block_tables_ptr=block_tables, delta_ptr=delta, last=len(changes) - 1,
        table_size=block_tables.numel(), ROWS=256,
    )  # fmt: skip


# How many numbers there are differs between models; specialising on that would compile the kernel again.
@triton.jit(do_not_specialize=["last", "table_size"])
def _changes_kernel(changes_ptr, block_tables_ptr, delta_ptr, last, table_size, ROWS: tl.constexpr):
    """Each of eight programs takes every eighth piece of ``ROWS`` changes."""
    count = tl.load(changes_ptr + last)
    targets_ptr = changes_ptr + last - 2 * count
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = row < count
        target = tl.load(targets_ptr + row, mask=mask, other=0)
        value = tl.load(targets_ptr + count + row, mask=mask, other=0)
        in_tables = target < table_size
        tl.store(block_tables_ptr + target, value.to(tl.int32), mask=mask & in_tables)
        tl.store(delta_ptr + target - table_size, value, mask=mask & (target >= table_size))
