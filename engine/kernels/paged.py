"""The paged KV cache: its tensors, a batch of sequences over it, and the device code that reads it.

:class:`KVCache` and :class:`AttentionMetadata` are the arguments of every attention kernel. The ``jit``
functions are shared by decode, mixed and prefill attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Kernels compute ``exp2(x * LOG2E)`` instead of ``exp(x)``: exp2 is one instruction.
LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one decoder layer, in blocks of tokens.

    It is built once, when the cache is allocated, so launches need not check the layout.

    Attributes:
        keys, values: ``(num_blocks, kv_heads, block_size, head_dim)``, each block contiguous, of one dtype,
            that of the model or fp8; ``kv_heads`` of this rank.
        key_scale, value_scale: what keys and values in fp8 are multiplied by; 1 for other dtypes.
        group: the layer's group, whose block tables say where its keys and values are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0
    group: int = 0

    def __post_init__(self) -> None:
        assert self.keys[0].is_contiguous() and self.values[0].is_contiguous()
        assert self.keys.shape == self.values.shape and self.keys.dtype == self.values.dtype
        assert self.keys.stride() == self.values.stride()
        assert self.is_fp8 or self.key_scale == self.value_scale == 1.0

    @property
    def is_fp8(self) -> bool:
        return self.keys.dtype == torch.float8_e4m3fn

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block_stride(self) -> int:
        """Numbers from a block to the next one: there may be other layers' between them."""
        return self.keys.stride(0)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys.shape[2]


@dataclass(slots=True)
class AttentionMetadata:
    """A batch of ``S`` sequences whose ``T`` new tokens are concatenated; passed through every forward pass.

    A KV slot is the index of one token in the cache: ``block * block_size + offset``.

    Attributes:
        block_tables: ``(S, max_blocks)`` int32, rows contiguous: KV blocks of each sequence in order; entries
            beyond its length are never read. With a leading axis for each group of layers, and taken apart
            by :meth:`by_group`.
        query_start: ``(S + 1,)`` int32, where each sequence's new tokens begin among the ``T``.
        seq_lens: ``(S,)`` int32, tokens of each sequence including the new ones.
        slot_mapping: ``(T,)`` int64, KV slot of each new token; nothing is written for negative entries. It
            has the same leading axis.
        max_query_len: upper bound of the new tokens of one sequence; a host integer. With 1, each sequence
            has exactly one.
        max_seq_len: upper bound of ``seq_lens``; a host integer.
        key_ends: ``(T,)`` int32, where the keys that a new token sees end: its index in the sequence plus
            one, or more, up to the sequence's length, where tokens attend both ways. It doesn't decrease
            within a sequence, unless there are ``gaps``. None: every token sees the keys up to its own.
        gaps: among tokens that attend both ways there may be some that don't. A token sees a later key only
            if that one's token is new as well and has the same end.
        split_counters: ``(S or more, kv_heads or more)`` int32 zeros, which count finished programs where decode
            attention splits keys (flash-decoding); zeros again after each launch. Launches that share them
            must not overlap. None allocates and clears them at each launch.
        state_rows: ``(S,)`` int64, row of each sequence in the pools of recurrent states; None for models
            without such.
        many_sequences: the bounds are those of a captured pass for many sequences. Most of them have one new
            token, or none: tiles made for long prompts would be empty.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    key_ends: torch.Tensor | None = None
    gaps: bool = False
    split_counters: torch.Tensor | None = None
    state_rows: torch.Tensor | None = None
    many_sequences: bool = False

    def by_group(self) -> list[AttentionMetadata]:
        """The same batch for the layers of each group."""
        if self.block_tables.dim() == 2:
            return [self]
        return [
            replace(self, block_tables=tables, slot_mapping=slots)
            for tables, slots in zip(self.block_tables, self.slot_mapping, strict=True)
        ]


def query_tiles(tokens: int, sequences: int, tokens_per_tile: int) -> int:
    """Return an upper bound of the query tiles of a batch, for :func:`find_tile`.

    Each sequence starts a tile of its own, so there may be one more tile per sequence than the tokens fill.
    """
    return tokens // tokens_per_tile + sequences


@triton.jit
def find_tile(query_start_ptr, seq_lens_ptr, tile, sequences, TOKENS: tl.constexpr):
    """Find the sequence of a query tile: the last one whose first tile, ``start // TOKENS + s``, is not
    later.

    Returns:
        The sequence, where its new tokens begin in the batch, the tile's first token among them (beyond their
        count if the tile is empty), their count, and the sequence's length.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    begin = tl.load(query_start_ptr + low)
    first_token = (tile - begin // TOKENS - low) * TOKENS
    count = tl.load(query_start_ptr + low + 1) - begin
    return low, begin, first_token, count, tl.load(seq_lens_ptr + low)


class HeadKeys(NamedTuple):
    """Pointers to the keys and values of one sequence and KV head.

    Attributes:
        k_ptr, v_ptr: the head in block 0.
        table_ptr: the sequence's row of the block tables.
        block_stride: elements between blocks.
    """

    k_ptr: tl.tensor
    v_ptr: tl.tensor
    table_ptr: tl.tensor
    block_stride: tl.tensor


class Softmax(NamedTuple):
    """State of the online softmax over the tiles of keys seen so far, one row per query (float32).

    Attributes:
        acc: ``(ROWS, DIM_PAD)``, sum of ``exp2(score - row_max) * value``.
        row_max: ``(ROWS,)``, maximum score, in units of log2(e).
        row_sum: ``(ROWS,)``, sum of ``exp2(score - row_max)``.
    """

    acc: tl.tensor
    row_max: tl.tensor
    row_sum: tl.tensor


@triton.jit
def empty_softmax(ROWS: tl.constexpr, DIM_PAD: tl.constexpr):
    """Return the :class:`Softmax` before any key."""
    return Softmax(
        tl.zeros([ROWS, DIM_PAD], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@triton.jit
def load_keys(
    keys, first_key, length,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of keys, ``(DIM_PAD, KEYS)``, and values, ``(KEYS, DIM_PAD)``, through the block table.

    Without ``MASKED`` all keys of the tile must lie before ``length``.
    """
    key = first_key + tl.arange(0, KEYS)
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    column = tl.arange(0, DIM_PAD)
    in_range = key < length
    if MASKED:
        block = tl.load(keys.table_ptr + key // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
    else:
        block = tl.load(keys.table_ptr + key // BLOCK_SIZE).to(tl.int64)
    offset = block * keys.block_stride + (key % BLOCK_SIZE) * DIM
    if MASKED or DIM != DIM_PAD:
        k_mask = (column[:, None] < DIM) & in_range[None, :]
        v_mask = in_range[:, None] & (column[None, :] < DIM)
        k = tl.load(keys.k_ptr + offset[None, :] + column[:, None], mask=k_mask, other=0.0)
        v = tl.load(keys.v_ptr + offset[:, None] + column[None, :], mask=v_mask, other=0.0)
    else:
        k = tl.load(keys.k_ptr + offset[None, :] + column[:, None])
        v = tl.load(keys.v_ptr + offset[:, None] + column[None, :])
    return k, v


@triton.jit
def beside_fp8(q):
    """Return queries in a dtype to which keys and values in fp8 are converted at little cost.

    One fast instruction converts two of them to float16; to bfloat16 each takes a slow one more. Queries in bfloat16
    become float16: exactly, but for magnitudes below 2⁻¹⁴, which lose bits, and those beyond float16's largest number,
    which become that.
    """
    if q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def capped(scores, scale, CAP: tl.constexpr):
    """Return ``CAP * tanh(scores * scale / CAP)``, for scores and a cap in units of log2(e)."""
    # tanh(x) is 1 - 2 / (exp(2x) + 1), and twice log2(e) is 2.885.
    return CAP - 2 * CAP / (tl.exp2(scores * (scale * 2.8853900817779268 / CAP)) + 1)


@triton.jit
def accumulate(
    state, q, k, v, first_key, last_key, position, length, scale, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, last_keys=None,
):  # fmt: skip
    """Add a loaded tile of keys and values to the online softmax.

    Args:
        state: a :class:`Softmax`; the new one is returned.
        first_key: position of the tile's first key.
        last_key: ``(ROWS,)``, position of the last key that each row sees.
        position: ``(ROWS,)``, position of each row's query, from which its window is counted.
        length: keys from there on are masked.
        scale: of the scores, times log2(e); positive.
        MASKED: whether some row does not see the whole tile.
        CAP: see :func:`capped`.
        last_keys: ``(KEYS,)``, position of the last key that the token of each key sees; keys behind a query are
            masked if it isn't the query's. None: all keys up to ``last_key`` count.
    """
    key = first_key + tl.arange(0, k.shape[1])
    in_range = key < length
    # Keys and values in fp8 are exact in other dtypes; their scales are factors of ``scale`` and of the result.
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = tl.dot(q, k, input_precision="ieee")
    if CAP > 0:
        scores = capped(scores, scale, CAP)
        scale = 1.0
    if MASKED:
        visible = (key[None, :] <= last_key[:, None]) & in_range[None, :]
        if last_keys is not None:
            visible &= (key[None, :] <= position[:, None]) | (last_keys[None, :] == last_key[:, None])
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    # Scaling here and in the subtraction below costs one multiply-add per score.
    row_max = tl.maximum(state.row_max, tl.max(scores, axis=1) * scale)
    base = row_max
    if MASKED:
        # For a row that has seen no key yet, -inf - -inf would be NaN.
        base = tl.where(row_max == float("-inf"), 0.0, row_max)
    probs = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(state.row_max - base)
    row_sum = state.row_sum * decay + tl.sum(probs, axis=1)
    acc = state.acc * decay[:, None]
    acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
    return Softmax(acc, row_max, row_sum)


@triton.jit
def attend(
    state, q, keys, first_key, last_key, position, length, scale, window,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, last_keys=None,
):  # fmt: skip
    """Load a tile of keys and values and add it to the online softmax; see :func:`accumulate`."""
    k, v = load_keys(keys, first_key, length, DIM, BLOCK_SIZE, KEYS, MASKED)
    return accumulate(
        state, q, k, v, first_key, last_key, position, length, scale, window, MASKED, WINDOW, CAP, last_keys
    )  # fmt: skip
