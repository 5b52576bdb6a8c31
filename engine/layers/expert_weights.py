"""The weights of all experts of a layer, in the model's dtype or in fp8, and the tensors that fill them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.errors import CheckpointError, ConfigError
from engine.kernels.experts import ExpertMatrices
from engine.kernels.fp8 import FP8, Scale
from engine.kernels.int4 import MIDDLE, Int4Scale
from engine.layers.build import BuildContext, Region, Target, WeightSlot
from engine.layers.fp4 import Fp4Matrix
from engine.layers.int4 import Int4Matrix
from engine.layers.matrix_formats import Fp4Format, Fp8Format, PackedFormat
from engine.layers.packed import PackedMatrix
from engine.layers.quantised import QuantisingRows, check_share, scale_slot


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One projection of every expert.

    Attributes:
        name: in checkpoints that store it apart, e.g. ``gate_proj``.
        total: outputs in the whole model.
        start, size: this rank's range of the outputs.
        total_inputs: inputs in the whole model.
        inputs, first: this rank's inputs: their number, and the first one.
    """

    name: str
    total: int
    start: int
    size: int
    total_inputs: int
    inputs: int
    first: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + self.inputs)


def _packed_matrices(
    name: str, stored: PackedFormat, part: ExpertPart, count: int, build: BuildContext
) -> list[PackedMatrix]:
    """One matrix for each expert.

    Raises:
        ConfigError: ranks would share inputs that are in another order.
    """
    shape = part.total_inputs, part.first, part.inputs
    if isinstance(stored, Fp4Format):
        return [Fp4Matrix(name, stored, *shape, build) for _ in range(count)]
    if stored.shuffled and part.inputs < part.total_inputs:
        raise ConfigError(
            f"tensor_parallel_size {part.total_inputs // part.inputs} splits the inputs of {name}, which are "
            "in another order (desc_act); experts whose inputs are in order can be split",
            param="tensor_parallel_size",
        )
    return [Int4Matrix(name, stored, *shape, build) for _ in range(count)]


class ExpertWeights(nn.Module):
    """Projections of one input, of every expert, one after the other: ``(E, outputs, inputs)``.

    Args:
        name: of the tensor that holds all of it.
        first: the number of the first expert in the checkpoint.
    """

    def __init__(
        self, name: str, parts: Sequence[ExpertPart], count: int, build: BuildContext, *, first: int = 0
    ) -> None:
        super().__init__()
        self.name, self.parts, self.count, self.dtype = name, tuple(parts), count, build.dtype
        self.first = first
        apart = [f"{first + expert}.{part.name}" for expert in range(count) for part in parts]
        stored = build.format_of(apart, name)
        rows, inputs = sum(part.size for part in parts), parts[0].inputs
        self.weight: torch.Tensor
        self.packed: list[PackedMatrix] = []
        self.format: Fp8Format | None = None
        if isinstance(stored, PackedFormat):
            self.packed = _packed_matrices(build.path + name, stored, parts[0], count, build)
            words = torch.empty((count, rows, 0), dtype=torch.int16, device=build.device)
            self.register_buffer("weight", words, persistent=False)
            self.matrices = ExpertMatrices(words)
            return
        self.format = stored
        scale = None
        if self.format is None:
            self.weight = build.parameter(count, rows, inputs)
        else:
            check_share(inputs, parts[0].first, parts[0].total_inputs, self.format)
            group = self.format.block[1] if self.format.shared == "block" else inputs
            self.weight = build.parameter(count, rows, inputs, dtype=FP8)
            values = build.parameter(count, rows, -(-inputs // group), dtype=torch.float32)
            if self.format.scale is None:
                # No tensor of the checkpoint fills it.
                self.register_buffer("scale", values.data, persistent=False)
            else:
                self.register_parameter("scale", values)
            scale = Scale(
                values.data.flatten(0, 1), group, self.format.round_inputs, _alike(self.format, self.parts)
            )
        self.matrices = ExpertMatrices(self.weight.data, scale)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        parent = prefix.removesuffix(self.name + ".")
        if self.packed:
            return [
                slot
                for expert, matrix in enumerate(self.packed)
                for part in self.parts
                for slot in matrix.slots(
                    f"{parent}{self.first + expert}.{part.name}.", part.total, [(part.start, part.size)]
                )
            ]
        if parent + self.name in names:
            return self._together(parent + self.name)
        return [slot for expert in range(self.count) for slot in self._apart(parent, expert)]

    def finish_loading(self) -> None:
        """Put weights in 4 bits, which were read, into the order of the kernels."""
        if not self.packed:
            return
        words, scales = zip(*(matrix.finish() for matrix in self.packed), strict=True)
        zeros = None
        if any(scale.zeros is not None for scale in scales):
            # Experts whose zero points are all in the middle have none.
            zeros = torch.cat(
                [
                    torch.full_like(scale.values, MIDDLE, dtype=torch.uint8)
                    if scale.zeros is None
                    else scale.zeros
                    for scale in scales
                ]
            )
        values = torch.cat([scale.values for scale in scales])
        known = [scale.factors for scale in scales if scale.factors is not None]
        scale = replace(
            scales[0],
            values=values,
            zeros=zeros,
            order=_orders(scales),
            factors=torch.cat(known) if known else None,
        )
        self.matrices = ExpertMatrices(torch.stack(words), scale)
        self.weight = self.matrices.weight

    def take_order(self) -> torch.Tensor | None:
        """Return the order of each expert's inputs ``(E, K)``, which the caller applies from now on.

        None if they are in order.
        """
        scale = self.matrices.scale
        if not isinstance(scale, Int4Scale) or scale.order is None:
            return None
        self.matrices = replace(self.matrices, scale=replace(scale, order=None))
        return scale.order

    def reorder_outputs(self, rows: torch.Tensor) -> None:
        """Put the outputs of each expert into the order ``rows``, ``(E, N)``.

        Raises:
            CheckpointError: the weights are in fp8.
        """
        weight, scale = self.matrices.weight, self.matrices.scale
        if isinstance(scale, Scale):
            raise CheckpointError(
                f"{self.name} of experts is in fp8 beside int4 with inputs in another order"
            )
        weight.copy_(_reordered(weight, rows))
        if scale is not None:
            parts = (scale.values, scale.zeros, scale.factors)
            values, zeros, factors = (
                None if part is None else _reordered(part.unflatten(0, rows.shape), rows).flatten(0, 1)
                for part in parts
            )
            assert values is not None
            scale = replace(scale, values=values, zeros=zeros, factors=factors)
        self.matrices = ExpertMatrices(weight, scale)

    def _target(self, *index: int | slice) -> Target:
        """The part of the weight that a checkpoint's tensor is copied to."""
        weight = self.weight.data[index]
        if self.format is None or self.format.scale is not None:
            return weight
        return QuantisingRows(weight, self.get_buffer("scale")[index], self.dtype)

    def _apart(self, parent: str, expert: int) -> list[WeightSlot]:
        """The slots of one expert's matrices, and of their scales."""
        slots, row = [], 0
        for part in self.parts:
            stem, shape = f"{parent}{self.first + expert}.{part.name}.", (part.total, part.total_inputs)
            own = slice(row, row + part.size)
            copies: list[tuple[Region, Target]] = [((part.rows, part.columns), self._target(expert, own))]
            slots.append(WeightSlot(f"{stem}weight", shape, copies))
            if self.format is not None and self.format.scale is not None:
                shards = [(part.start, self.get_parameter("scale").data[expert, own])]
                name = stem + self.format.scale
                slots.append(scale_slot(name, self.format, shape, shards, first_input=part.first))
            row += part.size
        return slots

    def _together(self, name: str) -> list[WeightSlot]:
        """The slots of the tensor of all experts, and of the tensor of its scales."""
        every, inputs = slice(0, self.count), self.parts[0].total_inputs
        outputs = sum(part.total for part in self.parts)
        slot = WeightSlot(name, (self.count, outputs, inputs), may_be_transposed=True)
        for part, row, start in self._places():
            region = (every, slice(start, start + part.size), part.columns)
            slot.copies.append((region, self._target(every, slice(row, row + part.size))))
        if self.format is None or self.format.scale is None:
            return [slot]
        return [slot, self._scales_together(name, self.format, outputs, inputs)]

    def _places(self) -> list[tuple[ExpertPart, int, int]]:
        """Each part, its first row here, and its first row for this rank in the tensor of all experts."""
        found, row, offset = [], 0, 0
        for part in self.parts:
            found.append((part, row, offset + part.start))
            row += part.size
            offset += part.total
        return found

    def _scales_together(self, name: str, stored: Fp8Format, outputs: int, inputs: int) -> WeightSlot:
        side, values = stored.block[0], self.get_parameter("scale").data
        shape = (self.count, -(-outputs // side), -(-inputs // side))
        if (
            stored.shared != "block"
            or stored.block[1] != side
            or (shape[1] == shape[2] and outputs != inputs)
        ):
            # Otherwise nothing would tell whether the scales are transposed.
            raise CheckpointError(
                f"{name} holds all experts in fp8: supported are square blocks, more of them along one axis "
                "than along the other; or a tensor for each expert"
            )
        slot = WeightSlot(
            f"{name}_{str(stored.scale).removeprefix('weight_')}", shape, may_be_transposed=True
        )
        for part, row, start in self._places():
            columns = slice(part.first // side, part.first // side + values.shape[2])
            for block in range(start // side, -(-(start + part.size) // side)):
                begin, end = max(start, block * side), min(start + part.size, (block + 1) * side)
                own = values[:, row + begin - start : row + end - start]
                # One row of scales fills the rows of its block.
                slot.copies.append(((slice(0, self.count), slice(block, block + 1), columns), own))
        return slot


def _alike(stored: Fp8Format, parts: Sequence[ExpertPart]) -> int:
    """Return how many consecutive outputs of each part have equal scales: a block's, if none is cut."""
    side = stored.block[0]
    whole = all(part.start % side == 0 for part in parts) and all(
        part.size % side == 0 for part in parts[:-1]
    )
    return side if stored.shared == "block" and whole else 1


def _orders(scales: Sequence[Int4Scale]) -> torch.Tensor | None:
    """The orders of all experts' inputs ``(E, K)``; None if all are in order."""
    if all(scale.order is None for scale in scales):
        return None
    in_order = torch.arange(scales[0].inputs, device=scales[0].values.device)
    return torch.stack([in_order if scale.order is None else scale.order for scale in scales])


def _reordered(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``values`` ``(E, N, ...)`` with the rows of each expert in the order ``rows`` ``(E, N)``."""
    expert = torch.arange(len(rows), device=rows.device)[:, None]
    return values[expert, rows]
