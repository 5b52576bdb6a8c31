"""A mixture of experts beside an MLP, both of one sum of attention and residual (Gemma 4)."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from engine.kernels.rms_norm import sum_with
from engine.kernels.route import Routing
from engine.kernels.router_config import RouterConfig
from engine.kernels.router_logits import router_logits
from engine.kernels.split_sums import Unfinished
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.experts import Experts
from engine.layers.experts_config import ExpertsConfig
from engine.layers.mlp import GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm, UnitNorm


class ScaledRouter(nn.Module):
    """Chooses experts by ``weight @ (norm(x) * scale) / sqrt(hidden)``, in float32 but for the norm, and
    multiplies the weight of each by a factor of its own."""

    def __init__(self, hidden: int, config: RouterConfig, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.norm = UnitNorm(hidden, eps, build)
        self.weight = build.parameter(config.num_experts, hidden, dtype=torch.float32)
        self.scale = build.parameter(hidden, dtype=torch.float32)
        self.factors = build.parameter(config.num_experts, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> Routing:
        return Routing(router_logits(self.norm(x), self.weight), self.config, factors=self.factors)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        own = {"weight": self.weight, "scale": self.scale, "factors": self.factors}
        return [plain_slot(prefix + name, each) for name, each in own.items()]

    def finish_loading(self) -> None:
        """Make the scale a part of the weight."""
        self.weight.data.mul_(self.scale * self.scale.numel() ** -0.5)


class ParallelExperts(GatedMLP):
    """Adds to an MLP, after a norm of its result, experts of the same input, after a norm of their own.

    They come before a norm, too, and are chosen by the input as it is.

    Args:
        intermediate: intermediate size of the MLP.
        eps: of the norms.
    """

    def __init__(
        self,
        hidden: int,
        config: ExpertsConfig,
        intermediate: int,
        activation: str,
        eps: float,
        build: BuildContext,
    ) -> None:
        super().__init__(hidden, intermediate, activation, build)
        self.tp = build.tp
        self.router = ScaledRouter(hidden, config.router, eps, build)
        size, count = config.intermediate_size, config.router.num_experts
        self.experts = Experts(hidden, size, count, activation, build.at("experts"))
        self.mlp_norm, self.experts_in_norm, self.experts_norm = (
            RMSNorm(hidden, eps, build, offset=0.0) for _ in range(3)
        )

    def idle_parameters(self) -> int:
        """Count the parameters of the experts that a token doesn't use."""
        count, config = sum(each.numel() for each in self.experts.parameters()), self.router.config
        return count - count * config.top_k // config.num_experts

    def after_norm(
        self, norm: RMSNorm | LayerNorm | None, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`GatedMLP.after_norm`."""
        inner, total = super().after_norm(norm, x, residual)
        routed = self.experts(self.experts_in_norm(total), self.router(total))
        routed = routed if self.tp.size == 1 else self.tp.all_reduce(routed)
        return sum_with(self.mlp_norm.of(inner), self.experts_norm(routed)), total
