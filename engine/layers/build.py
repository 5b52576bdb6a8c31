"""Allocates the parameters of modules, and describes the checkpoint tensors that fill them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from engine.errors import ConfigError
from engine.layers.matrix_formats import Formats, Fp8Format, PackedFormat

if TYPE_CHECKING:
    from engine.distributed.group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Device, dtype and tensor-parallel group of a model under construction.

    Parameters are allocated once, with their final dtype and device, and not initialised.

    Attributes:
        formats: which matrices are quantised; None: none is.
        tower: the format of the matrices in the blocks of a vision tower; None for the model's dtype.
        path: name in the model's part of the layer under construction, with a dot behind it.
    """

    device: torch.device
    dtype: torch.dtype
    tp: TensorParallelGroup
    formats: Formats | None = None
    tower: Fp8Format | None = None
    path: str = ""

    def at(self, name: str) -> BuildContext:
        """This context for the layer ``name`` within the present one."""
        return replace(self, path=f"{self.path}{name}.")

    def format_of(self, parts: Iterable[str] = ("",), fused: str = "") -> Fp8Format | PackedFormat | None:
        """The format of the matrix at this path, or of one that is stored as ``parts`` of it, or all together
        as ``fused``; None for the model's dtype. Errors as
        :meth:`~engine.layers.matrix_formats.Formats.of`."""
        if self.formats is None:
            return None
        names = [(self.path + name).removesuffix(".") for name in (fused, *parts)]
        return self.formats.of(names[1:], names[0])

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        values = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return nn.Parameter(values, requires_grad=False)

    def share(self, total: int, what: str) -> int:
        """Divide ``total`` by the number of ranks.

        Args:
            what: the name of the number in the error message.

        Raises:
            ConfigError: the ranks can't have equal shares.
        """
        if total % self.tp.size:
            raise ConfigError(
                f"tensor_parallel_size {self.tp.size} does not divide the model's {what} ({total})",
                param="tensor_parallel_size",
            )
        return total // self.tp.size


Region = tuple[slice, ...]


class Target(Protocol):
    """Rows that a region of a checkpoint tensor is copied to: a view of a parameter, or
    :class:`~engine.layers.quantised.QuantisingRows`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    def dim(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Target: ...

    def copy_(self, values: torch.Tensor, /, non_blocking: bool = False) -> Any: ...

    def fill_(self, value: float, /) -> Any: ...

    def untyped_storage(self) -> torch.UntypedStorage: ...


@dataclass(slots=True)
class WeightSlot:
    """A checkpoint tensor that a layer needs, and the parameters that it fills.

    Attributes:
        source: the tensor's name.
        shape: its whole shape in the checkpoint.
        copies: pairs of a region of the tensor and the view of a parameter that it fills. A rank lists only
            its own shard, so other regions are never read. A view that is larger than its region is filled
            by broadcasting.
        reshape: the checkpoint may also hold the tensor in another shape, with the same elements in the same
            order.
        may_be_transposed: the checkpoint may also hold the tensor with its last two of three axes swapped.
    """

    source: str
    shape: tuple[int, ...]
    copies: list[tuple[Region, Target]] = field(default_factory=list)
    reshape: bool = False
    may_be_transposed: bool = False


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
