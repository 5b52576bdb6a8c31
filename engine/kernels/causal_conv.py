"""Short causal convolutions: that of a gated delta net with the SiLU after it, and LFM2's between two gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata, find_tile, query_tiles
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.recurrent_state import StateCache, first_tokens

#: Tokens of one sequence, and channels, of a program.
_TOKENS = 16
_CHANNELS = 128


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """Compute ``silu(sum over j of weight[:, j] * x[t - W + 1 + j])`` along each sequence.

    The sum is in float32 and is rounded to the dtype before the SiLU, as in Transformers.

    Args:
        x: ``(T, C)``, last dimension contiguous; new tokens of the sequences of ``meta``, then padding.
        weight: ``(C, W)`` contiguous.
        cache: the inputs before the new ones; ``conv`` is changed to those after.
        meta: ``state_rows`` is distinct, except for sequences without new tokens.

    Returns:
        ``(T, C)`` contiguous; rows of padding are undefined.
    """
    return (conv_triton if use_triton(x) else conv_reference)(x, weight, None, cache, meta, gated=False)


def gated_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: StateCache,
    meta: AttentionMetadata,
) -> torch.Tensor:
    """Compute ``c * (bias + sum over j of weight[:, j] * (b * u)[t - W + 1 + j])`` along each sequence (LFM2).

    Each operation's result is rounded to the dtype, as in Transformers; the sum is in float32.

    Args:
        x: ``(T, 3 * C)``, last dimension contiguous: ``b``, ``c`` and ``u`` of each new token, then padding.
        weight: ``(C, W)`` contiguous.
        bias: ``(C,)`` or None.
        cache: the products ``b * u`` before the new ones; ``conv`` is changed to those after.
        meta: as for :func:`causal_conv`.

    Returns:
        ``(T, C)`` contiguous; rows of padding are undefined.
    """
    return (conv_triton if use_triton(x) else conv_reference)(x, weight, bias, cache, meta, gated=True)


def conv_reference(x, weight, bias, cache, meta, *, gated):
    """Compute :func:`gated_conv`, or without ``gated`` :func:`causal_conv`, in torch."""
    if gated:
        before, after, inner = x.chunk(3, dim=1)
        return after * _convolved(before * inner, weight, bias, cache, meta)
    return F.silu(_convolved(x, weight, bias, cache, meta))


def _convolved(x, weight, bias, cache, meta):
    assert meta.state_rows is not None
    width = weight.shape[1]
    shift = 0.0 if bias is None else bias.float()
    before = cache.conv[meta.state_rows].masked_fill(first_tokens(meta)[:, None, None], 0)
    if meta.max_query_len == 1:
        inputs = torch.cat([before, x[:, None]], dim=1)
        cache.conv[meta.state_rows] = inputs[:, 1:]
        return ((inputs.float() * weight.T.float()).sum(1) + shift).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bounds, rows = meta.query_start.tolist(), meta.state_rows.tolist()
    for index, row in enumerate(rows):
        start, end = bounds[index], bounds[index + 1]
        if end > start:
            inputs = torch.cat([before[index], x[start:end]])
            windows = inputs.unfold(0, width, 1).float()
            out[start:end] = ((windows * weight.float()).sum(-1) + shift).to(x.dtype)
            cache.conv[row] = inputs[-(width - 1) :]
    return out


def conv_triton(x, weight, bias, cache, meta, *, gated):
    channels, width = weight.shape
    assert x.stride(-1) == 1 and weight.is_contiguous() and cache.conv.shape[1:] == (width - 1, channels)
    assert meta.state_rows is not None
    assert x.shape[1] == (3 * channels if gated else channels)
    out = torch.empty((len(x), channels), dtype=x.dtype, device=x.device)
    sequences = meta.seq_lens.shape[0]
    tokens = 1 if meta.max_query_len == 1 else _TOKENS
    tiles = sequences if tokens == 1 else query_tiles(len(x), sequences, tokens)
    if tiles:
        launch(
            _causal_conv_kernel, (tiles, triton.cdiv(channels, _CHANNELS)),
            x_ptr=x, weight_ptr=weight, bias_ptr=weight if bias is None else bias, state_ptr=cache.conv, rows_ptr=meta.state_rows,
            query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, out_ptr=out,
            sequences=sequences, x_stride=x.stride(0),
            CHANNELS=channels, WIDTH=width, TOKENS=tokens, BLOCK=_CHANNELS, GATED=gated,
            HAS_BIAS=bias is not None, num_warps=4, **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["sequences"])
def _causal_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, rows_ptr, query_start_ptr, seq_lens_ptr, out_ptr,
    sequences, x_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of a sequence's new tokens and block of channels.

    The program of a sequence's first tile, which alone reads the state, also writes the new one.
    """
    wait_for_previous(PDL)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    if TOKENS == 1:
        sequence = tl.program_id(0)
        begin = tl.load(query_start_ptr + sequence)
        count = tl.load(query_start_ptr + sequence + 1) - begin
        first_token = 0
        length = tl.load(seq_lens_ptr + sequence)
    else:
        sequence, begin, first_token, count, length = find_tile(
            query_start_ptr, seq_lens_ptr, tl.program_id(0), sequences, TOKENS
        )
    if first_token >= count:
        return
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    state = state_ptr + row * (WIDTH - 1) * CHANNELS + channel
    x = x_ptr + begin.to(tl.int64) * x_stride + channel
    # Kept inputs have indices from -(WIDTH - 1) to -1. A sequence that begins here has none of them.
    bound = tl.where(length > count, 0, -WIDTH)
    token = first_token + tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        source = token - (WIDTH - 1) + tap
        new = (source >= 0) & (source < count)
        old = source < bound
        value = _load_inputs(x + source[:, None] * x_stride, new[:, None] & inside[None, :], CHANNELS, GATED)
        kept = tl.load(
            state + (source + (WIDTH - 1))[:, None] * CHANNELS, mask=old[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(weight_ptr + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
        total += (value.to(tl.float32) + kept.to(tl.float32)) * weight[None, :]
    rounded = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    if GATED:
        gate = tl.load(
            x + token[:, None] * x_stride + CHANNELS,
            mask=(token < count)[:, None] & inside[None, :],
            other=0.0,
        )
        active = rounded * gate.to(tl.float32)
    else:
        active = rounded / (1.0 + tl.exp(-rounded))
    out = out_ptr + (begin + token).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(out, active.to(out_ptr.dtype.element_ty), mask=(token < count)[:, None] & inside[None, :])
    if first_token == 0:
        # Other threads of the program may still read the state.
        tl.debug_barrier()
        _store_inputs(x, state, x_stride, channel, count, bound, CHANNELS, WIDTH, GATED)


@triton.jit
def _load_inputs(x, mask, CHANNELS: tl.constexpr, GATED: tl.constexpr):
    """Load inputs of the convolution: with ``GATED`` products of two of a token's three vectors."""
    value = tl.load(x, mask=mask, other=0.0)
    if GATED:
        factor = tl.load(x + 2 * CHANNELS, mask=mask, other=0.0)
        value = (value.to(tl.float32) * factor.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _store_inputs(
    x, state, x_stride, channel, count, bound,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Write a sequence's last ``WIDTH - 1`` inputs, oldest first.

    An entry is read before it or an older one is overwritten: entry ``i`` becomes the former ``i + count``.
    """
    inside = channel < CHANNELS
    for entry in tl.static_range(WIDTH - 1):
        source = tl.zeros_like(channel) + (count - (WIDTH - 1) + entry)
        new = _load_inputs(x + source * x_stride, inside & (source >= 0), CHANNELS, GATED)
        old = tl.load(state + (source + (WIDTH - 1)) * CHANNELS, mask=inside & (source < bound), other=0.0)
        tl.store(state + entry * CHANNELS, new + old, mask=inside)
