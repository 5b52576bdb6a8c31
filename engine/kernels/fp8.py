"""Matrices of 8-bit floats (fp8, ``float8_e4m3fn``) with scales, and GEMMs of many rows with them.

A weight is ``weight * scale``. The kernels for a few rows (gemv.py, norm_gemv.py, skinny_gemm.py) read the
fp8 numbers and multiply their sums by the scales. Where the checkpoint was made for that, the rows are rounded
to fp8 as well: Hopper multiplies fp8 by fp8 at twice the rate, and needs no conversion of the weight, which
takes longer than reading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.cublaslt import gemm_without_workspace
from engine.kernels.device import (
    MEMORY_BOUND_ROWS,
    compute_capability,
    is_hopper,
    num_sms,
    use_triton,
)
from engine.kernels.launch import launch
from engine.kernels.pdl import launch_dependents_of_one_row, pdl_options, wait_for_previous
from engine.kernels.split_sums import Unfinished

FP8 = torch.float8_e4m3fn
#: The largest number of the format.
LARGEST = 448.0
#: One row is multiplied by weights of up to so many numbers as it is, where to round it would take a launch. On an
#: H200 that is faster for 2048 outputs of 4096 inputs.
MAX_UNROUNDED = 9 << 20
#: Hopper's tensor cores keep 14 bits of a sum of fp8 products. Unless told otherwise torch adds up the sums of a few
#: inputs outside of them: on an H200 that takes 10 to 20 % longer for 1280 to 5120 inputs, and errs by 1.7
#: thousandths, as much as rounding the result does, not by 2.1. With 18 944 inputs it takes no longer, and errs by
#: 1.7, not by 3.8.
MAX_FAST_INPUTS = 8192
#: Rows, and outputs, of a tile of cuBLASLt's kernels with scales of rows.
_LIBRARY_TILE = 128
#: Lower bound of a row's largest magnitude.
_SMALLEST = 2.0**-100
#: Elements of a row that a program handles at a time.
_TILE = 1024
#: Longer rows are read twice to be rounded, since they don't fit in registers.
_LONGEST_ROW = 1 << 15


@dataclass(frozen=True, slots=True)
class Scale:
    """The factors of an fp8 weight ``(N, K)``.

    Attributes:
        values: ``(N, G)`` float32, contiguous: one for each output and each of ``G`` groups of inputs.
        group: consecutive inputs of a group; a power of two if there are several groups.
        round_inputs: the rows that the weight is multiplied by may be rounded to fp8 too, by groups if there are
            several.
        outputs: consecutive outputs with equal scales, from the first one on (of experts: of each projection).
    """

    values: torch.Tensor
    group: int
    round_inputs: bool = False
    outputs: int = 1


class RoundedRows(NamedTuple):
    """Rows rounded to fp8, each by its largest magnitude, or by that of each group of inputs.

    Attributes:
        numbers: ``(T, K)`` fp8, contiguous.
        scale: ``(T, G)`` float32: what the numbers of a row and group are multiplied by, their largest magnitude
            over :data:`LARGEST`.
    """

    numbers: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def empty(cls, rows: int, inputs: int, device: torch.device, groups: int = 1) -> RoundedRows:
        """Allocate rows for a kernel."""
        numbers = torch.empty((rows, inputs), dtype=FP8, device=device)
        return cls(numbers, torch.empty((rows, groups), dtype=torch.float32, device=device))


def dequantise(weight: torch.Tensor, scale: Scale, dtype: torch.dtype) -> torch.Tensor:
    """Compute ``weight * scale`` in float32 and round it to ``dtype``; ``(N, K)`` contiguous."""
    run = use_triton(weight) and reads_fp8(weight.device)
    return (dequantise_triton if run else dequantise_reference)(weight, scale, dtype)


def dequantise_reference(weight: torch.Tensor, scale: Scale, dtype: torch.dtype) -> torch.Tensor:
    wide = weight.float()
    if scale.values.shape[1] == 1:
        return wide.mul_(scale.values).to(dtype)
    return wide.mul_(scale.values.repeat_interleave(scale.group, dim=1)[:, : weight.shape[1]]).to(dtype)


def dequantise_triton(weight: torch.Tensor, scale: Scale, dtype: torch.dtype) -> torch.Tensor:
    outputs, inputs = weight.shape
    assert weight.stride(1) == 1 and scale.values.is_contiguous()
    out = torch.empty((outputs, inputs), dtype=dtype, device=weight.device)
    launch(
        _dequantise_kernel, (triton.cdiv(inputs, _TILE) * outputs,),
        weight_ptr=weight, scale_ptr=scale.values, out_ptr=out,
        inputs=inputs, weight_stride=weight.stride(0), groups=scale.values.shape[1],
        group=scale.group, TILE=_TILE, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["groups", "group"])
def _dequantise_kernel(
    weight_ptr, scale_ptr, out_ptr, inputs, weight_stride, groups, group, TILE: tl.constexpr
):  # fmt: skip
    """One program per tile of one weight row."""
    tiles = tl.cdiv(inputs, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    mask = k < inputs
    weight = tl.load(weight_ptr + row * weight_stride + k, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + row * groups + tl.minimum(k // group, groups - 1), mask=mask, other=0.0)
    result = weight.to(tl.float32) * scale
    tl.store(out_ptr + row * inputs + k, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def round_to_fp8(x, scale, dtype: tl.constexpr):
    """Round ``x / scale`` to ``dtype``, an fp8; numbers beyond its largest one become that."""
    return tl.minimum(tl.maximum(x.to(tl.float32) / scale, -448.0), 448.0).to(dtype)


def quantise_rows(x: torch.Tensor, group: int | None = None) -> RoundedRows:
    """Round ``(T, K)`` to fp8 with one scale a row, or one for each ``group`` inputs of a row."""
    run = use_triton(x) and reads_fp8(x.device)
    return (quantise_rows_triton if run else quantise_rows_reference)(x, group)


def quantise_rows_reference(x: torch.Tensor, group: int | None = None) -> RoundedRows:
    rows, inputs = x.shape
    group = group or max(1, inputs)
    wide = F.pad(x.float(), (0, -inputs % group)).view(rows, -(-inputs // group), group)
    # A row of zeros needs a scale as well.
    scale = wide.abs().amax(dim=2, keepdim=True).clamp(min=_SMALLEST) / LARGEST
    numbers = (wide / scale).clamp(-LARGEST, LARGEST).to(FP8)
    return RoundedRows(numbers.flatten(1)[:, :inputs].contiguous(), scale.squeeze(2))


def quantise_rows_triton(x: torch.Tensor, group: int | None = None) -> RoundedRows:
    assert x.stride(1) == 1
    return round_rows(x, x.shape[1]) if group is None else _quantise_groups(x, group)


def round_rows(x: torch.Tensor, size: int, activation: str = "", *, gated: bool = False) -> RoundedRows:
    """Round rows of ``size`` numbers to fp8, behind an activation if one is given; see
    :func:`engine.kernels.act_mul.act_rounded`."""
    rows = x.shape[0]
    assert x.stride(1) == 1 and x.shape[1] == (2 * size if gated else size)
    out = RoundedRows.empty(rows, size, x.device)
    if rows:
        tile = choose_round_tile(rows, size)
        launch(
            _round_kernel, (rows,), x_ptr=x, out_ptr=out.numbers, scale_ptr=out.scale, x_stride=x.stride(0),
            SIZE=size, ACTIVATION=activation, GATED=gated, CHUNK=tile.chunk, WHOLE=size <= _LONGEST_ROW,
            num_warps=tile.warps, **pdl_options(x),
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class RoundTile:
    """Numbers that a program handles at a time, and its warps."""

    chunk: int
    warps: int


def choose_round_tile(rows: int, size: int) -> RoundTile:
    """Choose the tile: eight numbers a thread at a time. Of a dozen it is the best on an H200, or within 2 % of the
    best, for rows of 1280 to 18 944 numbers. With few rows the time is that of one program."""
    padded = triton.next_power_of_2(size)
    warps = max(2, min(16, padded // (256 if rows <= MEMORY_BOUND_ROWS else 2048)))
    return RoundTile(min(warps * 256, padded), warps)


def _quantise_groups(x: torch.Tensor, group: int) -> RoundedRows:
    rows, inputs = x.shape
    groups = triton.cdiv(inputs, group)
    out = RoundedRows.empty(rows, inputs, x.device, groups)
    tile = min(triton.next_power_of_2(groups), max(1, 2 * _TILE // group))
    launch(
        _quantise_groups_kernel, (rows, triton.cdiv(groups, tile)), x_ptr=x, out_ptr=out.numbers,
        scale_ptr=out.scale, inputs=inputs, groups=groups, x_stride=x.stride(0), GROUPS=tile, GROUP=group,
        num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return out


def rounding_warps(size: int, rows: int) -> int:
    """Choose the warps of a program that rounds a row of ``size`` numbers, padded. With few rows the time is that
    of one program."""
    return max(4, min(32, size // (512 if rows <= MEMORY_BOUND_ROWS else 1024)))


@triton.jit
def scale_of_row(largest):
    """Scale of a row whose largest magnitude is ``largest``; a row of zeros needs one as well."""
    return tl.maximum(largest, 7.888609052210118e-31) / 448.0


@triton.jit
def store_rounded(x, row, column, size, mask, out_ptr, scale_ptr):
    """Round a row, ``x`` float32 with zeros where the mask is unset, and store its numbers and its scale."""
    scale = scale_of_row(tl.max(tl.abs(x), axis=0))
    tl.store(scale_ptr + row, scale)
    # Times the inverse: a division of each number would take longer than reading it.
    tl.store(out_ptr + row * size + column, (x * (1.0 / scale)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _round_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row; unless it keeps the ``WHOLE`` row, it reads it again, from the cache."""
    launch_dependents_of_one_row(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    start = x_ptr + row * x_stride
    largest = tl.zeros([CHUNK], tl.float32)
    if WHOLE:
        # All are loaded before the first is used.
        firsts = ()
        seconds = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + lane
            firsts = firsts + (tl.load(start + column, mask=column < SIZE, other=0.0),)
            if GATED:
                seconds = seconds + (tl.load(start + SIZE + column, mask=column < SIZE, other=0.0),)
        results = ()
        for chunk in tl.static_range(CHUNKS):
            second = seconds[chunk] if GATED else firsts[chunk]
            result = _activated(firsts[chunk], second, ACTIVATION, GATED)
            largest = tl.maximum(largest, tl.abs(result.to(tl.float32)))
            results = results + (result,)
        scale = scale_of_row(tl.max(largest, axis=0))
        tl.store(scale_ptr + row, scale)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + lane
            # Times the inverse: a division of each number would take longer than reading it.
            rounded = (results[chunk].to(tl.float32) * (1.0 / scale)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * SIZE + column, rounded, mask=column < SIZE)
    else:
        for first in range(0, SIZE, CHUNK):
            result = _load_activated(start, first + lane, SIZE, ACTIVATION, GATED)
            largest = tl.maximum(largest, tl.abs(result.to(tl.float32)))
        scale = scale_of_row(tl.max(largest, axis=0))
        tl.store(scale_ptr + row, scale)
        for first in range(0, SIZE, CHUNK):
            column = first + lane
            result = _load_activated(start, column, SIZE, ACTIVATION, GATED)
            rounded = (result.to(tl.float32) * (1.0 / scale)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * SIZE + column, rounded, mask=column < SIZE)


@triton.jit
def _load_activated(start, column, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    first = tl.load(start + column, mask=column < SIZE, other=0.0)
    second = first
    if GATED:
        second = tl.load(start + SIZE + column, mask=column < SIZE, other=0.0)
    return _activated(first, second, ACTIVATION, GATED)


@triton.jit
def _activated(first, second, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Apply the activation, if there is one. That of zero is zero, so what is beyond a row doesn't count.

    A gated result is rounded to the dtype as :func:`engine.kernels.act_mul.act_mul` rounds it. Otherwise the only
    rounding is that to fp8.
    """
    result = first
    if ACTIVATION != "":
        result = activate(first.to(tl.float32), ACTIVATION)
    if GATED:
        result = (result.to(first.dtype).to(tl.float32) * second.to(tl.float32)).to(first.dtype)
    return result


@triton.jit
def _quantise_groups_kernel(
    x_ptr, out_ptr, scale_ptr, inputs, groups, x_stride, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per row and ``GROUPS`` groups of inputs."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < inputs, other=0.0).to(tl.float32)
    scale = scale_of_row(tl.max(tl.abs(x), axis=1))
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
    numbers = (x * (1.0 / scale)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * inputs + column, numbers, mask=column < inputs)


def reads_fp8(device: torch.device) -> bool:
    """Return whether Triton kernels can read fp8 on this device: not on GPUs before Ada and Hopper."""
    return device.type != "cuda" or compute_capability(device) >= (8, 9)


def supports_scaled(x: torch.Tensor | Unfinished, weight: torch.Tensor, scale: Scale) -> bool:
    """Return whether :func:`scaled_gemm` can compute this, and may round the rows of ``x``."""
    outputs, inputs = weight.shape
    fits = scale.values.shape[1] == 1 and outputs % 16 == inputs % 16 == 0 and weight.is_contiguous()
    return scale.round_inputs and fits and x.dtype == torch.bfloat16 and is_hopper(x.device)


def scaled_gemm(
    rows: RoundedRows, weight: torch.Tensor, scale: Scale, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Compute ``rows @ (weight * scale).T + bias`` in ``dtype``, on fp8 tensor cores.

    Up to :data:`MAX_FAST_INPUTS` inputs are summed up as the tensor cores do it.
    """
    fast = weight.shape[1] <= MAX_FAST_INPUTS
    tiles = triton.cdiv(len(rows.numbers), _LIBRARY_TILE) * triton.cdiv(len(weight), _LIBRARY_TILE)
    # Tiles in one round are computed by the same kernel either way. PyTorch's call takes the host half as long.
    if dtype == torch.bfloat16 and tiles > num_sms(weight.device):
        out = gemm_without_workspace(rows.numbers, weight, rows.scale, scale.values, bias, fast=fast)
        if out is not None:
            return out
    return torch._scaled_mm(
        rows.numbers,
        weight.t(),
        rows.scale,
        scale.values.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def dequantised_gemm(
    x: torch.Tensor, weight: torch.Tensor, scale: Scale, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute ``x @ (weight * scale).T + bias`` with the weight dequantised to the dtype of ``x`` for this call."""
    return F.linear(x, dequantise(weight, scale, x.dtype), bias)
