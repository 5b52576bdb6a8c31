"""Allocates the parameters of modules, and describes the checkpoint tensors that fill them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from engine.distributed.group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Device, dtype and tensor-parallel group of a model under construction.

    Parameters are allocated once, with their final dtype and device, and not initialised.
    """

    device: torch.device
    dtype: torch.dtype
    tp: TensorParallelGroup

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def share(self, total: int, what: str) -> int:
        """Divide ``total`` by the number of ranks.

        Args:
            what: the name of the number in the error message.

        Raises:
            ConfigError: the ranks can't have equal shares.
        """
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
    """A checkpoint tensor that a layer needs, and the parameters that it fills.

    Attributes:
        source: the tensor's name.
        shape: its whole shape in the checkpoint.
        copies: pairs of a region of the tensor and the view of a parameter that it fills. A rank lists only
            its own shard, so other regions are never read.
        reshape: the checkpoint may also hold the tensor in another shape, with the same elements in the same
            order.
    """

    source: str
    shape: tuple[int, ...]
    copies: list[tuple[Region, torch.Tensor]] = field(default_factory=list)
    reshape: bool = False


def whole(shape: tuple[int, ...]) -> Region:
    """Make the region that covers a whole tensor of ``shape``."""
    return tuple(slice(0, size) for size in shape)


def plain_slot(source: str, parameter: torch.Tensor, *, reshape: bool = False) -> WeightSlot:
    """Make a slot whose tensor fills all of ``parameter``.

    Args:
        reshape: see :class:`WeightSlot`.
    """
    shape = tuple(parameter.shape)
    return WeightSlot(source, shape, [(whole(shape), parameter.data)], reshape)
