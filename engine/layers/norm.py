"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.fp8 import RoundedRows
from engine.kernels.layer_norm import add_layer_norm, layer_norm_rounded
from engine.kernels.rms_norm import Addend, rms_norm, rms_norm_rounded
from engine.kernels.split_sums import SplitSums, Unfinished, whole
from engine.layers.build import BuildContext, WeightSlot, plain_slot


class RMSNorm(nn.Module):
    """Computes ``(weight + offset) * x / sqrt(mean(x²) + eps)`` over the last dimension, see
    :func:`~engine.kernels.rms_norm.rms_norm`."""

    def __init__(self, width: int, eps: float, build: BuildContext, *, offset: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = build.parameter(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset)

    def of(self, x: torch.Tensor | SplitSums, multiplier: float = 1.0) -> Addend:
        """Return the norm of a result ``(T, width)``, times a number, for what adds it to the residual."""
        return Addend(x, self.weight, self.eps, self.offset, multiplier)

    def add(
        self, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``norm(x + residual)`` and ``x + residual``; ``residual`` None counts as zero."""
        if residual is None:
            x = whole(x)
            return self(x), x
        return rms_norm(x, self.weight, self.eps, residual, offset=self.offset)

    def add_rounded(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[RoundedRows, torch.Tensor]:
        """Compute :meth:`add` of ``(N, width)`` with the rows of the norm rounded to fp8."""
        return rms_norm_rounded(x, self.weight, self.eps, residual, offset=self.offset)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "weight", self.weight)]


class UnitNorm(nn.Module):
    """Computes ``x / sqrt(mean(x²) + eps)`` over the last dimension."""

    def __init__(self, width: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.eps = eps
        self.ones: torch.Tensor
        ones = torch.ones(width, dtype=build.dtype, device=build.device)
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.ones, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with a scale and, unless ``shift`` is False, a shift."""

    def __init__(self, width: int, eps: float, build: BuildContext, *, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = build.parameter(width)
        self.bias = build.parameter(width) if shift else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of ``x + residual`` and the sum, both (N, width); see :meth:`RMSNorm.add`."""
        if residual is None:
            x = whole(x)
            return self(x), x
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def add_rounded(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[RoundedRows, torch.Tensor]:
        """Compute :meth:`add` with the rows of the norm rounded to fp8."""
        return layer_norm_rounded(x, residual, self.weight, self.bias, self.eps)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        slots = [plain_slot(prefix + "weight", self.weight)]
        return slots if self.bias is None else [*slots, plain_slot(prefix + "bias", self.bias)]
