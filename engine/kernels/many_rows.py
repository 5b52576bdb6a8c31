"""Linear layers of many rows with the activation that follows: the inner layers of towers over pictures.

These products are bound by the matrix unit, and torch's are as fast; but the activation is bound by memory, and by
itself reads and writes once more what the product has in registers. Tiles come and go by tensor memory descriptors,
which Hopper GPUs have; each program works on one tile after the other and loads the next while it stores the last.
The reference is torch's product with the activation after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.activation import ACTIVATIONS, activate
from engine.kernels.dispatch import use_triton
from engine.kernels.launch import is_compiling, launch
from engine.kernels.tiling import num_processors, nvidia_capability

#: Share of the processors that have a tile in an average round. With less, torch's smaller tiles take less time.
_LEAST_BUSY = 0.85
#: Tiles of rows that are worked on together, so that they find each other's weights in L2.
_GROUP = 8


def activated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``.

    Args:
        x: ``(..., K)``, last dimension contiguous.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``.
        bias: ``(N,)``.
        activation: a key of :data:`engine.kernels.activation.ACTIVATIONS`.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    flat = x.flatten(0, -2)
    if can_take(flat, weight):
        busy = keeps_busy(flat.shape[0], weight.shape[0], num_processors(x.device))
        # Ahead of time the kernels for other numbers of rows are compiled as well.
        if busy or is_compiling():
            out = activated_linear_triton(flat, weight, bias, activation)
        if busy:
            return out.unflatten(0, x.shape[:-1])
    return activated_linear_reference(x, weight, bias, activation)


def activated_linear_reference(x, weight, bias, activation):
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def can_take(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can compute the product of ``x`` ``(T, K)`` with ``weight`` ``(N, K)``."""
    wanted = x.element_size() == 2 and use_triton(x) and nvidia_capability(x.device) == (9, 0)
    return wanted and _fits(x) and _fits(weight) and weight.shape[0] % 8 == 0


def keeps_busy(rows: int, outputs: int, processors: int) -> bool:
    """Whether a product's tiles are many, and end together."""
    tile = tiling()
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    rounds = triton.cdiv(tiles, processors)
    return rounds > 1 and tiles >= _LEAST_BUSY * rounds * processors


def _fits(matrix: torch.Tensor) -> bool:
    """Whether a descriptor can describe it."""
    row, column = matrix.stride()
    return column == 1 and row * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows, outputs and inputs per tile, and how the compiler schedules them."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def tiling() -> Tiling:
    """The tile; the one place where this is decided. The best of three on an H100."""
    return Tiling(128, 256, 64, 8, 4)


def activated_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """See :func:`activated_linear`; for ``x`` ``(T, K)`` and a weight with rows at multiples of 16 bytes. Nothing is
    rounded in between."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == inputs > 0 and x.dtype == weight.dtype
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tile = tiling()
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    launch(
        _many_rows_kernel,
        (min(tiles, num_processors(x.device)),),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]),
        TensorDescriptor.from_tensor(weight, [tile.outputs, tile.inputs]),
        TensorDescriptor.from_tensor(out, [tile.rows, tile.outputs // 2]),
        x if bias is None else bias,
        rows,
        outputs,
        inputs,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        GROUP=_GROUP,
        BIAS=bias is not None,
        ACTIVATION=activation,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


# Pictures differ in this number; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["rows"])
def _many_rows_kernel(
    x_desc,
    weight_desc,
    out_desc,
    bias_ptr,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
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
        # In two halves: whole, it would take the memory that the next tile's inputs come to.
        first, second = acc.reshape(ROWS, 2, OUTPUTS // 2).permute(0, 2, 1).split()
        _store(out_desc, row, output, first, bias_ptr, outputs, BIAS, ACTIVATION)
        _store(out_desc, row, output + OUTPUTS // 2, second, bias_ptr, outputs, BIAS, ACTIVATION)


@triton.jit
def _store(out_desc, row, output, product, bias_ptr, outputs, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    if BIAS:
        column = output + tl.arange(0, product.shape[1])
        bias = tl.load(bias_ptr + column, mask=column < outputs, other=0.0)
        product += bias.to(tl.float32)[None, :]
    out_desc.store([row, output], activate(product, ACTIVATION).to(out_desc.dtype))
