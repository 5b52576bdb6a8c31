"""GEMM with many input rows and a fused activation: the first layer of a vision tower's MLP.

The GEMM is compute-bound, and torch's is as fast. But the activation is memory-bound: as a kernel of its own
it reads and writes the GEMM's output once more. Here it runs on the accumulators in registers. Tiles are
loaded and stored through tensor memory descriptors (TMA) of Hopper GPUs. The kernel is persistent: each
program computes one tile after the other and loads the next while it stores the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.activation import ACTIVATIONS, activate
from engine.kernels.device import has_descriptor, is_hopper, num_sms
from engine.kernels.launch import launch

#: Below this share of SMs that have a tile in an average wave, torch's smaller tiles are faster.
_MIN_OCCUPANCY = 0.85
#: Tiles of rows that run together, so that they find each other's weights in L2.
_GROUP = 8


def gemm_activation_reference(x, weight, bias, activation):
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel can multiply ``x`` ``(T, K)`` by ``weight`` ``(N, K)``."""
    fits = x.element_size() == 2 and is_hopper(x.device) and weight.shape[0] % 8 == 0
    return fits and has_descriptor(x) and has_descriptor(weight)


def fills_gpu(rows: int, outputs: int, sms: int) -> bool:
    """Return whether a GEMM has several waves of tiles, and its last wave is not mostly empty."""
    tile = choose_tile()
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    waves = triton.cdiv(tiles, sms)
    return waves > 1 and tiles >= _MIN_OCCUPANCY * waves * sms


@dataclass(frozen=True, slots=True)
class GemmTile:
    """Rows and outputs per tile, inputs per step, warps of a program and depth of the software pipeline."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def choose_tile() -> GemmTile:
    """Choose the tile: the best of three on an H100."""
    return GemmTile(128, 256, 64, 8, 4)


def gemm_activation_triton(x, weight, bias, activation):
    """See :func:`engine.kernels.dispatch.activated_linear`; for ``x`` ``(T, K)`` that :func:`supports`
    admits.

    Sums, bias and activation are float32; only the result is rounded.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == inputs > 0 and x.dtype == weight.dtype
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tile = choose_tile()
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    launch(
        _gemm_activation_kernel, (min(tiles, num_sms(x.device)),),
        x_desc=TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]),
        weight_desc=TensorDescriptor.from_tensor(weight, [tile.outputs, tile.inputs]),
        out_desc=TensorDescriptor.from_tensor(out, [tile.rows, tile.outputs // 2]),
        bias_ptr=x if bias is None else bias, rows=rows, outputs=outputs, inputs=inputs,
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, GROUP=_GROUP,
        BIAS=bias is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


# ``rows`` differs between images; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows"])
def _gemm_activation_kernel(
    x_desc, weight_desc, out_desc, bias_ptr, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per SM, each for every ``num_programs``-th tile."""
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(outputs, OUTPUTS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        within = tile % (GROUP * across)
        row = (group * GROUP + within % height) * ROWS
        output = within // height * OUTPUTS
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for k in range(0, inputs, INPUTS):
            acc = tl.dot(x_desc.load([row, k]), weight_desc.load([output, k]).T, acc, input_precision="ieee")
        # Stored in two halves: a whole tile would take the shared memory that the next tile is loaded to.
        first, second = acc.reshape(ROWS, 2, OUTPUTS // 2).permute(0, 2, 1).split()
        _store(out_desc, row, output, first, bias_ptr, outputs, BIAS, ACTIVATION)
        _store(out_desc, row, output + OUTPUTS // 2, second, bias_ptr, outputs, BIAS, ACTIVATION)


@triton.jit
def _store(out_desc, row, output, acc, bias_ptr, outputs, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Add the bias, apply the activation and store half a tile."""
    if BIAS:
        column = output + tl.arange(0, acc.shape[1])
        bias = tl.load(bias_ptr + column, mask=column < outputs, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_desc.store([row, output], activate(acc, ACTIVATION).to(out_desc.dtype))
