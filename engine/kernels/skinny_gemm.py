"""GEMM with 2 to 64 input rows ("skinny"), as in the decode steps of a server that is not full.

Such a GEMM is memory-bound: it has to read the weight once. A tile of weight rows is the left operand of the
tensor core instruction, which is at least 64 rows high on Hopper, and the few input rows are the right
operand. Where the layer has too few outputs to fill the GPU, several programs share a tile's inputs
(split-K), and the last one to finish adds up their partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.device import MEMORY_BOUND_ROWS, num_sms, shared_memory
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.scales import scale_arguments
from engine.kernels.split_sums import SplitSums

#: Split-K programs have at least this many inputs: less is read faster than partial sums are added.
_MIN_SPLIT_INPUTS = 1024
#: The same with rows and weights in fp8.
_MIN_SPLIT_FP8_INPUTS = 896
#: Up to this many inputs a shallower pipeline is faster.
_SHORT_INPUTS = 2048
#: Outputs per tile, and per split-K counter.
TILE_OUTPUTS = 64


def split_counters(outputs: int, device: torch.device) -> torch.Tensor:
    """Allocate zeroed split-K counters for a layer, one per tile of outputs and of rows, of which there are two
    at most; int32.

    The kernel leaves zeros behind, so the layer passes the same tensor to every call; calls must not overlap.
    """
    return torch.zeros(2 * triton.cdiv(outputs, TILE_OUTPUTS), dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """Tile of a skinny GEMM.

    Attributes:
        inputs: inputs per step.
        warps: warps of a program.
        stages: depth of the software pipeline over inputs.
        splits: programs that share the inputs of an output tile (split-K).
    """

    inputs: int
    warps: int
    stages: int
    splits: int


def choose_tile(
    rows: int, outputs: int, inputs: int, *, gated: bool, itemsize: int, sms: int, memory: int
) -> SkinnyTile:
    """Choose the tile of a problem.

    Of dozens of tiles it is among the best on an H100 and an H200 for the layers of models of 2 and 7 billion
    parameters.

    Args:
        rows: input rows, padded.
        outputs: outputs of the layer; with a gate, after it.
        itemsize: bytes of an element.
        sms: SMs of the GPU.
        memory: bytes of shared memory that a program may use.
    """
    tiles = triton.cdiv(outputs, TILE_OUTPUTS)
    if itemsize == 1:
        return _choose_fp8_tile(rows, tiles, inputs, gated, sms, memory)
    if not gated:
        width, stages = 128, 5
    elif rows <= 16:
        width, stages = 128, 4 if inputs > _SHORT_INPUTS else 3
    elif tiles <= 2 * sms:
        # Small enough for two programs per SM: all tiles run in one wave.
        width, stages = 64, 4
    else:
        # With several waves, deeper pipelining matters more.
        width, stages = 128, 4
    width = max(16, min(width, triton.next_power_of_2(inputs)))
    stage_bytes = (TILE_OUTPUTS * (2 if gated else 1) + rows) * width * itemsize
    splits = 1 if gated else max(1, min(sms // tiles, inputs // _MIN_SPLIT_INPUTS))
    return SkinnyTile(width, 4, max(1, min(stages, memory // stage_bytes)), splits)


def _choose_fp8_tile(rows: int, tiles: int, inputs: int, gated: bool, sms: int, memory: int) -> SkinnyTile:
    """Choose the tile of a GEMM of fp8 with fp8: the best or within 4 % of it of some dozens on an H200, for the
    layers of a model of 7 billion parameters with 1 and 64 rows."""
    width = max(32, min(128, triton.next_power_of_2(inputs)))
    if gated:
        warps, stages, splits = 8, 3, 1
    elif rows <= 16:
        warps, stages = 8, 4
        # Half the bytes of 16-bit weights: more programs read at a time.
        splits = min(triton.cdiv(2 * sms, tiles), inputs // _MIN_SPLIT_FP8_INPUTS)
    else:
        warps, stages = 4, 6
        splits = min(sms // tiles, inputs // _MIN_SPLIT_INPUTS)
    stage_bytes = (TILE_OUTPUTS * (2 if gated else 1) + rows) * width
    return SkinnyTile(width, warps, max(1, min(stages, memory // stage_bytes)), max(1, splits))


def skinny_gemm_triton(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    counters=None,
    scale=None,
    row_scale=None,
    dtype=None,
    parts=False,
):
    """See :func:`engine.kernels.dispatch.linear`; for at most ``MEMORY_BOUND_ROWS`` rows.

    Sums, bias and gate are float32; only the result is rounded.

    Args:
        counters: see :func:`split_counters`. None: no split-K.
        row_scale: what the rows of an fp8 ``x`` are multiplied by, ``(T, 1)`` float32 contiguous; ``scale``
            has one number an output then, and the tensor cores multiply fp8 by fp8.
        dtype: of the result; None: that of ``x``.
        parts: return :class:`~engine.kernels.split_sums.SplitSums`; without an activation.
    """
    rows, inputs = x.shape
    gated = activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert 0 < rows <= MEMORY_BOUND_ROWS and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and (scale is not None or x.dtype == weight.dtype)
    # Two heights only: a kernel per power of two would make start-up longer.
    rows_pad = 16 if rows <= 16 else MEMORY_BOUND_ROWS
    sms, memory = num_sms(x.device), shared_memory(x.device)
    tile = choose_tile(
        rows_pad, outputs, inputs, gated=gated, itemsize=x.element_size(), sms=sms, memory=memory
    )
    scales = scale_arguments(x, scale)
    # All inputs of a step have one scale.
    width = min(tile.inputs, scales["GROUP"]) if scales["GROUP"] > 0 else tile.inputs
    splits = 1 if counters is None and not parts else tile.splits
    parts = parts and splits > 1
    tiles = triton.cdiv(outputs, TILE_OUTPUTS)
    assert counters is None or (counters.is_contiguous() and len(counters) >= tiles)
    assert row_scale is None or (scales["GROUP"] == 0 and row_scale.is_contiguous())
    if parts:
        out = torch.empty((splits, rows, outputs), device=x.device)
    else:
        out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    # Without split-K these are never accessed; any tensor does.
    partial = out if splits == 1 or parts else torch.empty((splits, rows, outputs), device=x.device)
    launch(
        _skinny_gemm_kernel, (tiles, splits),
        x_ptr=x, weight_ptr=weight, bias_ptr=x if bias is None else bias, out_ptr=out,
        row_scale_ptr=x if row_scale is None else row_scale,
        partial_ptr=partial, counters_ptr=out if splits == 1 or parts else counters,
        rows=rows, outputs=outputs, inputs=inputs,
        x_stride=x.stride(0), weight_stride=weight.stride(0), splits=splits, **scales,
        ROWS=rows_pad, TILE_OUTPUTS=TILE_OUTPUTS, TILE_INPUTS=width, STAGES=tile.stages,
        # Tiles that are full need no masks.
        EVEN=inputs % width == 0,
        SPLIT=splits > 1 and not parts, PARTS=parts, BIAS=bias is not None, ACTIVATION=activation or "",
        ROW_SCALES=row_scale is not None,
        num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return SplitSums(out, dtype or x.dtype) if parts else out


@triton.jit
def _load_tile(start, lane, first, end, EVEN: tl.constexpr, AXIS: tl.constexpr):
    """Load the tile of inputs from ``first`` on; inputs run along dimension ``AXIS``."""
    if EVEN:
        return tl.load(start + first)
    return tl.load(start + first, mask=tl.expand_dims(first + lane < end, 1 - AXIS), other=0.0)


@triton.jit
def _add_products(acc, weight, x, scale_ptr, output, groups, k, GROUP: tl.constexpr):
    """Add ``weight @ x`` to ``acc``, times the scales of the group of input ``k`` if there are groups.

    Hopper sums products of fp8 with 14 bits only, so the sum over a tile is added to ``acc`` outside.
    """
    if GROUP > 0:
        scale = tl.load(scale_ptr + output.to(tl.int64) * groups + k // GROUP)
        acc += tl.dot(weight.to(x.dtype), x, input_precision="ieee") * scale[:, None]
    else:
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee", max_num_imprecise_acc=128)
    return acc


@triton.jit
def sum_of_splits(acc, partial_ptr, offset, mask, counter, split, splits, rows, outputs):
    """Store the sums ``acc`` of a split, and add up those of all splits in the program that finishes last.

    Args:
        partial_ptr: ``(splits, rows, outputs)`` float32, each split's sums.
        offset: of the tile's elements in the sums of a split.
        counter: pointer to the number of splits of the tile that have finished, int32; 0 again afterwards.

    Returns:
        The sum, in the last program; and whether it is this one.
    """
    tl.store(partial_ptr + split * rows * outputs + offset, acc, mask=mask)
    # All threads must have written before the program counts itself as finished.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(counter, 0)
        acc = tl.zeros_like(acc)
        for part in range(splits):
            acc += tl.load(partial_ptr + part * rows * outputs + offset, mask=mask, other=0.0)
    return acc, last


# These differ between batches and layers; specialising on them would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows", "splits"])
def _skinny_gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, row_scale_ptr, partial_ptr, counters_ptr,
    rows, outputs, inputs, x_stride, weight_stride, splits, scale_ptr, groups,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ROW_SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per output tile and split.

    Args:
        partial_ptr: ``(splits, rows, outputs)`` float32, each split's sums.
        counters_ptr: ``(tiles,)`` int32, splits that have finished.
        PARTS: ``out_ptr`` takes the sums of each split, as ``partial_ptr`` does.
        GROUP: see :func:`~engine.kernels.scales.scale_arguments`; a multiple of ``TILE_INPUTS`` if positive.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    output = tile * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, TILE_INPUTS)
    share = tl.cdiv(tl.cdiv(inputs, TILE_INPUTS), splits) * TILE_INPUTS
    first = split * share
    end = tl.minimum(first + share, inputs)
    # Lanes beyond the last output or row load the last one again; their results are not stored.
    known = tl.minimum(output, outputs - 1)
    weights = weight_ptr + known.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    ups = weights + tl.cast(outputs, tl.int64) * weight_stride
    xs = x_ptr + tl.minimum(row, rows - 1)[None, :] * x_stride + lane[:, None]
    acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    up = acc
    # Scales and biases: loaded before the PDL wait, so that their latency is not exposed in the epilogue.
    if GROUP == 0:
        scale = tl.load(scale_ptr + known)
        if ACTIVATION != "":
            up_scale = tl.load(scale_ptr + outputs + known)
    if BIAS:
        biased = outputs
        if PARTS:
            biased = tl.where(split == 0, outputs, 0)
        bias = tl.load(bias_ptr + output, mask=output < biased, other=0.0)
        if ACTIVATION != "":
            up_bias = tl.load(bias_ptr + outputs + output, mask=output < outputs, other=0.0)
    wait_for_previous(PDL)
    for k in tl.range(first, end, TILE_INPUTS, num_stages=STAGES):
        x = _load_tile(xs, lane, k, end, EVEN, 0)
        weight = _load_tile(weights, lane, k, end, EVEN, 1)
        acc = _add_products(acc, weight, x, scale_ptr, known, groups, k, GROUP)
        if ACTIVATION != "":
            weight = _load_tile(ups, lane, k, end, EVEN, 1)
            up = _add_products(up, weight, x, scale_ptr, outputs + known, groups, k, GROUP)
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    offset = row[None, :] * outputs + output[:, None]
    last = True
    if SPLIT:
        acc, last = sum_of_splits(
            acc, partial_ptr, offset, mask, counters_ptr + tile, split, splits, rows, outputs
        )
    if last:
        if ROW_SCALES:
            row_scale = tl.load(row_scale_ptr + row, mask=row < rows, other=0.0)[None, :]
            acc *= row_scale
            if ACTIVATION != "":
                up *= row_scale
        if GROUP == 0:
            acc *= scale[:, None]
            if ACTIVATION != "":
                up *= up_scale[:, None]
        if BIAS:
            acc += bias.to(tl.float32)[:, None]
        if ACTIVATION != "":
            if BIAS:
                up += up_bias.to(tl.float32)[:, None]
            acc = activate(acc, ACTIVATION) * up
        if PARTS:
            offset += split * rows * outputs
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
