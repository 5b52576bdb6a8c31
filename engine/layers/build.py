"""Where and how a module's parameters are made, and how a layer says which checkpoint tensors fill them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from engine.distributed.group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Parameters are allocated once, in their final dtype on their final device, without initialisation."""

    device: torch.device
    dtype: torch.dtype
    tp: TensorParallelGroup

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def share(self, total: int, what: str) -> int:
        """This rank's equal share of ``total``; an uneven split is a mistake of the configuration."""
        from engine.errors import ConfigError

        if total % self.tp.size:
            raise ConfigError(
                f"tensor_parallel_size {self.tp.size} does not divide the model's {what} ({total})",
                param="tensor_parallel_size",
            )
        return total // self.tp.size


Region = tuple[slice, ...]


@dataclass(slots=True)
class WeightSlot:
    """A tensor that a layer wants from the checkpoint, and where its parts go.

    Attributes:
        source: the tensor's name.
        shape: its whole shape in the checkpoint; a list of ints.
        copies: pairs of a region of the source and the view of a parameter that it fills. A rank names only
            its own shard, so the rest is never read.
        reshape: shapes that the checkpoint may also have, with the same numbers in the same order.
    """

    source: str
    shape: tuple[int, ...]
    copies: list[tuple[Region, torch.Tensor]] = field(default_factory=list)
    reshape: bool = False


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of a tensor of ``shape``."""
    return tuple(slice(0, size) for size in shape)


def plain_slot(source: str, parameter: torch.Tensor, *, reshape: bool = False) -> WeightSlot:
    """A slot whose tensor fills ``parameter`` as it is."""
    shape = tuple(parameter.shape)
    return WeightSlot(source, shape, [(whole(shape), parameter.data)], reshape)
