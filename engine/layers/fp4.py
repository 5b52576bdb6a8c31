"""Matrices of linear layers in floats of 4 bits, and the checkpoint tensors that fill them."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels.int4 import Int4Scale, pack
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.matrix_formats import FP4_NAMES, Fp4Format


class Fp4Matrix:
    """Reads a rank's matrix, which may be several stored ones; see :class:`engine.layers.int4.Int4Matrix`."""

    #: The rank needs its own inputs only.
    gathers = False

    def __init__(
        self, name: str, stored: Fp4Format, inputs: int, first: int, count: int, build: BuildContext
    ) -> None:
        self.stored, self._device = stored, build.device
        self._inputs, self._first, self._count = inputs, first, count
        self._shards: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        if count < inputs and (count % stored.group or first % stored.group):
            raise ConfigError(
                f"tensor_parallel_size {inputs // count} cuts a group of {stored.group} inputs of the "
                f"{stored.kind} weights of {name.removesuffix('.')}: each rank would have {count} of "
                f"{inputs}",
                param="tensor_parallel_size",
            )

    def slots(self, stem: str, total: int, ranges: list[tuple[int, int]]) -> list[WeightSlot]:
        """Allocate memory for a stored matrix, and describe its tensors.

        Args:
            stem: the beginning of the tensors' names.
            total: outputs of the stored matrix.
            ranges: the rank's outputs of it: the first one of each range, and their number.
        """
        numbers, scales, factor = FP4_NAMES[self.stored.layout]
        group, end = self.stored.group, self._first + self._count
        pairs = WeightSlot(stem + numbers, (total, -(-self._inputs // 2)))
        scale = WeightSlot(stem + scales, (total, -(-self._inputs // group)))
        whole = WeightSlot(stem + factor, (1,), reshape=True) if factor else None
        known = torch.empty(1, device=self._device) if factor else None
        if whole is not None and known is not None:
            whole.copies.append(((slice(0, 1),), known))
        for start, size in ranges:
            rows = slice(start, start + size)
            own = slice(self._first // 2, -(-end // 2)), slice(self._first // group, -(-end // group))
            found = [
                torch.empty((size, columns.stop - columns.start), dtype=dtype, device=self._device)
                for columns, dtype in zip(own, (torch.uint8, self.stored.scale_dtype), strict=True)
            ]
            for slot, columns, values in zip((pairs, scale), own, found, strict=True):
                slot.copies.append(((rows, columns), values))
            self._shards.append((found[0], found[1], known))
        return [pairs, scale, *([whole] if whole else [])]

    def finish(self) -> tuple[torch.Tensor, Int4Scale]:
        """Put the tensors, which were read, into the order of the kernels: words and scales."""
        shards, self._shards = self._shards, []
        numbers = [torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1) for pairs, _, _ in shards]
        scale = Int4Scale(
            self._count,
            torch.cat([scales.view(torch.uint8) for _, scales, _ in shards]).contiguous(),
            self.stored.group,
            kind=self.stored.kind,
            factors=self._factors(shards),
        )
        return pack(torch.cat(numbers)[:, : self._count]), scale

    def _factors(
        self, shards: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    ) -> torch.Tensor | None:
        """The factor of each output ``(N,)``."""
        known = [factor.expand(len(pairs)) for pairs, _, factor in shards if factor is not None]
        if not known:
            return None
        factors = torch.cat(known)
        return factors if self.stored.layout == "modelopt" else 1 / factors
