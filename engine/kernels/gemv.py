"""GEMV: a linear layer of one input row.

It is memory-bound: each program reads a few weight rows from end to end and sums products on the CUDA cores;
tensor cores would not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import launch
from engine.kernels.pdl import launch_dependents, pdl_options, wait_for_previous
from engine.kernels.peer_reduce import PeerBuffers, send, send_arguments, sum_sent
from engine.kernels.peer_reduce import choose_tile as choose_reduce_tile
from engine.kernels.scales import scale_arguments, times_scales

#: Up to so many steps a program loads whole weight rows before the previous kernel has ended.
MAX_STEPS = 4


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Outputs per program, inputs per step, and warps of a program."""

    outputs: int
    inputs: int
    warps: int


def choose_tile(outputs: int, inputs: int, itemsize: int = 2) -> GemvTile:
    """Choose the tile of a problem; ``itemsize`` is the number of bytes of a weight.

    Of nine tiles it is the best on an H100 and an H200, or within 1 % of it, by the time of whole decode
    steps of models of 2 and 7 billion parameters; for 2560 outputs by those of one of 4 billion on an H200. For
    up to 2048 outputs of 4096 inputs it is the best of ten, of 18 in fp8, by the time of whole decoder layers on an
    H200. For more outputs, and for more than 8192, it is the best of 18 and 22 there, or within 2 % of it, by chains
    of a layer's GEMVs of seven models and by their LM heads.
    """
    wide = itemsize == 2 and inputs > 2048
    if outputs > 8192:
        tile_outputs, tile_inputs, warps = 4, 1024 if wide else 512, 4
    elif outputs > 2048 and wide and inputs <= 4096:
        # Whole rows, loaded in advance.
        tile_outputs, tile_inputs, warps = 1, 4096, 8
    elif 2048 < outputs <= 3072:
        tile_outputs, tile_inputs, warps = 2, 1024, 4
    elif 3072 < outputs <= 3584 and itemsize == 2 and inputs > 16384:
        # Seven programs of each SM, all at a time.
        tile_outputs, tile_inputs, warps = 4, 1024, 4
    elif outputs > 4096 and wide:
        # With one output each there would be more programs than run at a time, and few at the end.
        tile_outputs, tile_inputs, warps = 2, 2048, 8
    elif outputs > 2048:
        # One output per program: small programs, of which an SM runs more at a time.
        tile_outputs, tile_inputs, warps = 1, 256, 2
    elif 2048 < inputs <= MAX_STEPS * 1024:
        # So few programs that all of them run at a time, with whole rows loaded in advance.
        tile_outputs, tile_inputs, warps = 4 if itemsize == 2 else 2, 1024, 4
    else:
        tile_outputs, tile_inputs, warps = 1, 1024, 4
    if itemsize == 1:
        # As many bytes at a time as of 16-bit weights.
        tile_inputs *= 2
    return GemvTile(tile_outputs, min(tile_inputs, triton.next_power_of_2(inputs)), warps)


def gemv_triton(x, weight, bias=None, scale=None):
    """See :func:`engine.kernels.dispatch.linear`; for one row, without an activation."""
    outputs = weight.shape[0]
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    tile, arguments = _arguments(x, weight, scale)
    launch(
        _gemv_kernel, (triton.cdiv(outputs, tile.outputs),),
        out_ptr=out, bias_ptr=x if bias is None else bias, BIAS=bias is not None, EARLY=starts_next_early(tile),
        **arguments,
    )  # fmt: skip
    return out


def starts_next_early(tile: GemvTile) -> bool:
    """Return whether the next kernel, mostly a norm's GEMV, may load its first weights before this one has its input.

    Not beside programs that hold several rows of weights, which leave no registers to those of the next kernel.
    """
    return tile.outputs < 4


def gemv_sum_triton(x, weight, scale, peers: PeerBuffers):
    """See :func:`engine.kernels.dispatch.sum_linear`; for one row.

    Each program writes its outputs to all ranks; a second launch, which begins meanwhile, adds up those of all.
    """
    outputs = weight.shape[0]
    tile, arguments = _arguments(x, weight, scale)
    reduce = choose_reduce_tile(outputs, x.element_size(), peers.size, trips=1)
    launch(
        _gemv_send_kernel, (triton.cdiv(outputs, tile.outputs),),
        **arguments, **send_arguments(x, reduce, peers),
    )  # fmt: skip
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    sum_sent(out, peers, reduce)
    return out


def _arguments(x, weight, scale):
    """The tile of a problem, and its arguments and launch options."""
    outputs, inputs = weight.shape
    assert x.shape == (1, inputs) and inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and (scale is not None or x.dtype == weight.dtype)
    tile = choose_tile(outputs, inputs, weight.element_size())
    steps = triton.cdiv(inputs, tile.inputs)
    return tile, {
        "x_ptr": x, "weight_ptr": weight, "outputs": outputs, "inputs": inputs,
        "weight_stride": weight.stride(0), **scale_arguments(x, scale),
        "TILE_OUTPUTS": tile.outputs, "TILE_INPUTS": tile.inputs, "STEPS": steps if steps <= MAX_STEPS else 0,
        "num_warps": tile.warps, **pdl_options(x),
    }  # fmt: skip


@triton.jit
def _step_products(
    weight, x_ptr, output, outputs, first, lane, inputs, scale_ptr, groups, GROUP: tl.constexpr
):  # fmt: skip
    """Products of inputs from ``first`` on with their weights, times the scales of groups."""
    k = first + lane
    # Every row of the tile loads the input from the cache by itself. Loading it once and broadcasting it
    # would exchange it between threads, and could cost a barrier per step.
    x = tl.load(x_ptr + k, mask=k < inputs, other=0.0)
    product = weight.to(tl.float32) * x.to(tl.float32)
    if GROUP > 0:
        product = times_scales(product, scale_ptr, output, output < outputs, groups, first, inputs, GROUP)
    return product


@triton.jit
def _products(
    x_ptr, weight_ptr, output, outputs, inputs, weight_stride, scale_ptr, groups, GROUP: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The dot products of a tile of weight rows with ``x``, which the previous kernel may write.

    STEPS: over the inputs, if the weights of all are loaded at once; 0: a loop.
    """
    row_mask = (output < outputs)[:, None]
    lane = tl.zeros([TILE_OUTPUTS, 1], tl.int32) + tl.arange(0, TILE_INPUTS)[None, :]
    weights = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
    products = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    if STEPS > 0:
        ready = ()
        for step in tl.static_range(STEPS):
            k = step * TILE_INPUTS + lane
            ready = ready + (tl.load(weights + k, mask=row_mask & (k < inputs), other=0.0),)
        wait_for_previous(PDL)
        for step in tl.static_range(STEPS):
            first = step * TILE_INPUTS
            products += _step_products(
                ready[step], x_ptr, output, outputs, first, lane, inputs, scale_ptr, groups, GROUP
            )
    else:
        # Prefetch each tile of weights during the step before, the first one before the previous kernel has
        # written x.
        next_weight = tl.load(weights + lane, mask=row_mask & (lane < inputs), other=0.0)
        wait_for_previous(PDL)
        for first in range(0, inputs, TILE_INPUTS):
            weight = next_weight
            following = first + TILE_INPUTS + lane
            next_weight = tl.load(weights + following, mask=row_mask & (following < inputs), other=0.0)
            products += _step_products(
                weight, x_ptr, output, outputs, first, lane, inputs, scale_ptr, groups, GROUP
            )
    result = tl.sum(products, axis=1)
    if GROUP == 0:
        result *= tl.load(scale_ptr + output, mask=output < outputs, other=0.0)
    return result


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, outputs, inputs, weight_stride, scale_ptr, groups,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr,
    BIAS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of outputs; ``GROUP`` as in :func:`~engine.kernels.scales.scale_arguments`."""
    if EARLY:
        launch_dependents(PDL)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    result = _products(
        x_ptr, weight_ptr, output, outputs, inputs, weight_stride, scale_ptr, groups, GROUP, TILE_OUTPUTS,
        TILE_INPUTS, STEPS, PDL,
    )  # fmt: skip
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < outputs)


@triton.jit(do_not_specialize=["share", "rank"])
def _gemv_send_kernel(
    x_ptr, weight_ptr, outputs, inputs, weight_stride, scale_ptr, groups, addresses, halves_ptr, share, rank,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr,
    HALF: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """:func:`_gemv_kernel` whose outputs go to all ranks; see :func:`~engine.kernels.peer_reduce.send`."""
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    result = _products(
        x_ptr, weight_ptr, output, outputs, inputs, weight_stride, scale_ptr, groups, GROUP, TILE_OUTPUTS,
        TILE_INPUTS, STEPS, PDL,
    )  # fmt: skip
    numbers = result.to(x_ptr.dtype.element_ty)
    send(numbers, output, output < outputs, addresses, halves_ptr, share, rank, HALF, SIZE)
