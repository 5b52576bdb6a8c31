"""Feed-forward layers."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.act_mul import act_mul
from engine.kernels.fp8 import RoundedRows
from engine.kernels.split_sums import SplitSums, Unfinished
from engine.layers.build import BuildContext
from engine.layers.linear import Linear, RowLinear, gate_up_linear
from engine.layers.matrix_formats import Fp8Format
from engine.layers.norm import LayerNorm, RMSNorm


class GatedMLP(nn.Module):
    """Computes ``down(act(gate(x)) * up(x))``; the intermediate features are split over ranks."""

    def __init__(
        self, hidden: int, intermediate: int, activation: str, build: BuildContext, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        stored = build.format_of(["gate_proj", "up_proj"], "gate_up_proj")
        padding = 0
        if isinstance(stored, Fp8Format) and stored.scale is None:
            # fp8 is multiplied in steps of 16.
            padding = -build.share(intermediate, "intermediate size") % 16
        self.gate_up_proj = gate_up_linear(hidden, intermediate, build, bias=bias, padding=padding)
        self.down_proj = RowLinear(intermediate, hidden, build.at("down_proj"), bias=bias, padding=padding)

    def takes_rounded(self, x: torch.Tensor) -> bool:
        """Return whether :meth:`forward` takes rows in fp8 instead of ``x``."""
        return self.gate_up_proj.takes_rounded(x) and self.down_proj.takes_rounded(x)

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        if isinstance(x, RoundedRows):
            return self.down_proj(self.gate_up_proj.gated_rounded(x, self.activation))
        return self.down_proj(act_mul(self.gate_up_proj(x), self.activation))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """Compute this rank's share of :meth:`forward`, which is the sum over ranks; without biases."""
        return self.down_proj.partial(self.gate_up_proj.normed(x, self.activation))

    def normed(self, x: torch.Tensor) -> torch.Tensor | SplitSums:
        """Compute :meth:`forward` of what a norm gives, which is :meth:`after_norm` without the norm."""
        return self.down_proj(self.gate_up_proj.normed(x, self.activation))

    def after_norm(
        self, norm: RMSNorm | LayerNorm | None, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | SplitSums, torch.Tensor]:
        """Compute ``mlp(norm(x + residual))``; returns it and ``x + residual``, both ``(T, hidden)``."""
        rounded = self.down_proj.takes_rounded(x)
        project = self.gate_up_proj.rounded_after_norm if rounded else self.gate_up_proj.after_norm
        inner, residual = project(norm, x, residual, activation=self.activation)
        return self.down_proj(inner), residual


class MLP(nn.Module):
    """Computes ``fc2(act(fc1(x)))``, both layers with biases.

    Args:
        out: features of the result; ``hidden`` if None.
        stored: the format of the weights; None for the model's dtype.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str,
        build: BuildContext,
        *,
        out: int | None = None,
        stored: Fp8Format | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(hidden, intermediate, build, stored=stored)
        self.fc2 = Linear(intermediate, out or hidden, build, stored=stored)

    def takes_rounded(self, x: torch.Tensor) -> bool:
        """Return whether :meth:`forward` takes rows in fp8 instead of ``x``."""
        return self.fc1.takes_rounded(x) and self.fc2.takes_rounded(x)

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        if isinstance(x, RoundedRows):
            return self.fc2(self.fc1.activated_rounded(x, self.activation))
        return self.fc2(self.fc1.activated(x, self.activation))
