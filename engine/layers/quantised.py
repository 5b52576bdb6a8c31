"""Matrices of linear layers, in the model's dtype or in fp8, and the checkpoint tensors of their scales."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import ConfigError
from engine.kernels.fp8 import FP8, Scale, quantise_rows
from engine.layers.build import BuildContext, Region, Target, WeightSlot
from engine.layers.matrix_formats import Fp8Format


def make_matrix(
    layer: nn.Module, rows: int, inputs: int, build: BuildContext, stored: Fp8Format | None
) -> tuple[nn.Parameter, Scale | None]:
    """Allocate a rank's matrix ``(rows, inputs)`` of a layer, and its scales, which become the layer's
    ``weight_scale``."""
    if stored is None:
        return build.parameter(rows, inputs), None
    group = stored.block[1] if stored.shared == "block" else max(1, inputs)
    values = build.parameter(rows, -(-inputs // group), dtype=torch.float32)
    if stored.scale is None:
        # No tensor of the checkpoint fills it.
        layer.register_buffer("weight_scale", values.data, persistent=False)
    else:
        layer.register_parameter("weight_scale", values)
    return build.parameter(rows, inputs, dtype=FP8), Scale(values.data, group, stored.round_inputs)


def matrix_target(
    weight: torch.Tensor, scale: Scale | None, stored: Fp8Format | None, dtype: torch.dtype
) -> Target:
    """The rows that a checkpoint's matrix of ``dtype`` is copied to."""
    if scale is None or stored is None or stored.scale is not None:
        return weight.data
    return QuantisingRows(weight.data, scale.values, dtype)


def scale_slot(
    name: str,
    stored: Fp8Format,
    shape: tuple[int, int],
    shards: Iterable[tuple[int, torch.Tensor]],
    *,
    first_input: int = 0,
) -> WeightSlot:
    """The slot of a matrix's scales.

    Args:
        name: of the tensor with the scales.
        shape: of the whole matrix ``(N, K)`` in the checkpoint.
        shards: the rank's rows of the matrix: the first one's index, and the scales of these rows.
        first_input: the first of the matrix's inputs that the rank has; the first of a block.
    """
    outputs, inputs = shape
    if stored.shared == "tensor":
        # One number fills all rows.
        whole: list[tuple[Region, Target]] = [((slice(0, 1),), values[None]) for _, values in shards]
        return WeightSlot(name, (1,), whole, reshape=True)
    if stored.shared == "output":
        rows: list[tuple[Region, Target]] = [
            ((slice(start, start + len(values)), slice(0, 1)), values) for start, values in shards
        ]
        return WeightSlot(name, (outputs, 1), rows, reshape=True)
    high, wide = stored.block
    slot = WeightSlot(name, (-(-outputs // high), -(-inputs // wide)))
    for start, values in shards:
        columns = slice(first_input // wide, first_input // wide + values.shape[1])
        for block in range(start // high, -(-(start + len(values)) // high)):
            own = values[max(0, block * high - start) : (block + 1) * high - start]
            # One row of scales fills the rows of its block.
            slot.copies.append(((slice(block, block + 1), columns), own[None]))
    return slot


def check_share(inputs: int, first: int, total: int, stored: Fp8Format) -> None:
    """Check that a rank's ``inputs`` from ``first`` on of ``total`` are whole blocks.

    Raises:
        ConfigError: they are not.
    """
    if stored.shared == "block" and inputs < total and (inputs % stored.block[1] or first % stored.block[1]):
        raise ConfigError(
            f"tensor_parallel_size {total // inputs} cuts a block of {stored.block[1]} inputs of the fp8 "
            f"weights: each rank would have {inputs} of {total}",
            param="tensor_parallel_size",
        )


class QuantisingRows:
    """Rows of an fp8 matrix, or of several, and of its scales, to which rows in another dtype are copied.

    It takes the place of a tensor in :class:`~engine.layers.build.WeightSlot`.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self._weight, self._scale = weight, scale
        self.dtype, self.shape = dtype, weight.shape

    def __getitem__(self, rows: slice) -> QuantisingRows:
        return QuantisingRows(self._weight[rows], self._scale[rows], self.dtype)

    def dim(self) -> int:
        return self._weight.dim()

    def fill_(self, value: float) -> None:
        raise AssertionError("matrices are never filled with one number")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._weight.untyped_storage()

    def copy_(self, values: torch.Tensor, non_blocking: bool = False) -> None:
        """Round ``values`` to fp8, each row with a scale of its own. Inputs that they lack are zeros."""
        values = values.to(self._weight.device, non_blocking=non_blocking)
        values = F.pad(values, (0, self.shape[-1] - values.shape[-1]))
        numbers, scale = quantise_rows(values.flatten(0, -2))
        self._weight.copy_(numbers.view(self.shape))
        self._scale.copy_(scale.view(self._scale.shape))
