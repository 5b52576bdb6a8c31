"""Linear layers of a few rows: the decode steps of a server that isn't full.

The product is bound by reading the weight, as with one row, but takes the matrix unit. A tile of the weight's rows
is the left operand, whose height the unit is made for, and the few rows of the input the right one. Where a layer
has too few outputs to fill the device, programs share the inputs of a tile, and the one that is through last adds
up what the others have left. The reference is that of :mod:`engine.kernels.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.tiling import FEW_ROWS, num_processors, shared_memory

#: With more, as before the vocabulary, torch's product reads at the rate of memory as well.
_MOST_OUTPUTS = 1 << 16
#: Fewer inputs for a program would be read in less time than it takes to add up.
_LEAST_SHARE = 1024
#: Up to so many inputs, rows of the weight are short.
_SHORT_INPUTS = 2048
#: Outputs of a tile, and so of those that share a counter.
TILE_OUTPUTS = 64


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of ``x`` ``(T, K)`` with ``weight`` ``(N, K)`` is ours: torch's takes longer for a few
    rows of half-precision numbers."""
    few = 1 < x.shape[0] <= FEW_ROWS and weight.shape[0] <= _MOST_OUTPUTS and x.element_size() == 2
    return few and use_triton(x)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Inputs of a tile, how the compiler schedules it, and the programs that share its inputs."""

    inputs: int
    warps: int
    stages: int
    splits: int


def tiling(
    rows: int, outputs: int, inputs: int, *, gated: bool, itemsize: int, processors: int, memory: int
) -> Tiling:
    """The tile for a problem; the one place where this is decided.

    Among the best of dozens on an H100 and an H200 for the layers of models of 2 and 7 billion parameters.

    Args:
        rows: of the tile.
        outputs: of the layer, after the gate.
        processors: that there are to be filled.
        memory: bytes that a program may use.
    """
    tiles = triton.cdiv(outputs, TILE_OUTPUTS)
    if not gated:
        width, stages = 128, 5
    elif rows <= 16:
        width, stages = 128, 4 if inputs > _SHORT_INPUTS else 3
    elif tiles <= 2 * processors:
        # Small enough for two programs on a processor: all tiles are worked on at once.
        width, stages = 64, 4
    else:
        # In several rounds, what is on its way while a tile ends counts for more.
        width, stages = 128, 4
    width = max(16, min(width, triton.next_power_of_2(inputs)))
    held = (TILE_OUTPUTS * (2 if gated else 1) + rows) * width * itemsize
    splits = 1 if gated else max(1, min(processors // tiles, inputs // _LEAST_SHARE))
    return Tiling(width, 4, max(1, min(stages, memory // held)), splits)


def few_rows_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`engine.kernels.linear.linear`; for up to ``FEW_ROWS`` rows. Between the product and the gate nothing
    is rounded.

    Args:
        arrivals: int32, at least one zero for each ``TILE_OUTPUTS`` outputs, and zeros again afterwards, to count
            programs in. Used by one launch at a time. None: inputs are not shared.
    """
    rows, inputs = x.shape
    gated = activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert 0 < rows <= FEW_ROWS and weight.shape[1] == inputs > 0 and x.dtype == weight.dtype
    assert x.stride(-1) == weight.stride(-1) == 1
    # Two heights: a kernel for each power of two would make a start longer.
    rows_pad = 16 if rows <= 16 else FEW_ROWS
    tile = tiling(
        rows_pad,
        outputs,
        inputs,
        gated=gated,
        itemsize=x.element_size(),
        processors=num_processors(x.device),
        memory=shared_memory(x.device),
    )
    splits = 1 if arrivals is None else tile.splits
    tiles = triton.cdiv(outputs, TILE_OUTPUTS)
    assert arrivals is None or (arrivals.is_contiguous() and len(arrivals) >= tiles)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    partial = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    launch(
        _few_rows_kernel,
        (tiles, splits),
        x,
        weight,
        x if bias is None else bias,
        out,
        partial,
        out if splits == 1 else arrivals,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        splits,
        ROWS=rows_pad,
        TILE_OUTPUTS=TILE_OUTPUTS,
        TILE_INPUTS=tile.inputs,
        STAGES=tile.stages,
        # Tiles that are full need no masks.
        EVEN=inputs % tile.inputs == 0,
        SPLIT=splits > 1,
        BIAS=bias is not None,
        ACTIVATION=activation or "",
        num_warps=tile.warps,
        **overlap(x),
    )
    return out


@triton.jit
def _load_inputs(start, lane, first, end, EVEN: tl.constexpr, ALONG: tl.constexpr):
    """A tile whose dimension ``ALONG`` is that of the inputs, from ``first`` on."""
    if EVEN:
        return tl.load(start + first)
    return tl.load(start + first, mask=tl.expand_dims(first + lane < end, 1 - ALONG), other=0.0)


# Batches and layers differ in these numbers; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["rows", "splits"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    splits,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    output = tile * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, TILE_INPUTS)
    share = tl.cdiv(tl.cdiv(inputs, TILE_INPUTS), splits) * TILE_INPUTS
    first = split * share
    end = tl.minimum(first + share, inputs)
    # What is beyond the last output or row is as the last one, and not stored.
    weights = (
        weight_ptr + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * weight_stride + lane[None, :]
    )
    ups = weights + tl.cast(outputs, tl.int64) * weight_stride
    xs = x_ptr + tl.minimum(row, rows - 1)[None, :] * x_stride + lane[:, None]
    acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    factor = acc
    wait_for_previous(OVERLAP)
    for k in tl.range(first, end, TILE_INPUTS, num_stages=STAGES):
        x = _load_inputs(xs, lane, k, end, EVEN, 0)
        acc = tl.dot(_load_inputs(weights, lane, k, end, EVEN, 1), x, acc, input_precision="ieee")
        if ACTIVATION != "":
            factor = tl.dot(_load_inputs(ups, lane, k, end, EVEN, 1), x, factor, input_precision="ieee")
    wanted = (output < outputs)[:, None] & (row < rows)[None, :]
    place = row[None, :] * outputs + output[:, None]
    last = True
    if SPLIT:
        tl.store(partial_ptr + split * rows * outputs + place, acc, mask=wanted)
        # All threads have written before one of them says so.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(arrivals_ptr + tile, 0)
            acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
            for part in range(splits):
                acc += tl.load(partial_ptr + part * rows * outputs + place, mask=wanted, other=0.0)
    if last:
        if BIAS:
            bias = tl.load(bias_ptr + output, mask=output < outputs, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        if ACTIVATION != "":
            if BIAS:
                bias = tl.load(bias_ptr + outputs + output, mask=output < outputs, other=0.0)
                factor += bias.to(tl.float32)[:, None]
            acc = activate(acc, ACTIVATION) * factor
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=wanted)
