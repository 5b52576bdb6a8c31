"""A mixture of experts in place of an MLP."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from engine.kernels.dispatch import experts
from engine.kernels.norm_router import norm_router
from engine.kernels.route import Routing
from engine.kernels.router_config import RouterConfig
from engine.kernels.router_logits import router_logits
from engine.kernels.split_sums import Unfinished, whole
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.expert_weights import ExpertPart, ExpertWeights
from engine.layers.experts_config import ExpertsConfig
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm


class Router(nn.Module):
    """Computes the float32 logits that choose the experts of each token, the same on every rank.

    The weight is float32 too: rounded logits would often be equal among a hundred experts, and the choice
    between equal ones is arbitrary.
    """

    def __init__(self, hidden: int, config: RouterConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.weight = build.parameter(config.num_experts, hidden, dtype=torch.float32)
        self.bias = None
        if config.correction_bias:
            self.bias = build.parameter(config.num_experts, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> Routing:
        """Compute the logits of ``(T, hidden)``."""
        return Routing(router_logits(x, self.weight), self.config, self.bias)

    def after_norm(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Compute ``norm(x + residual)``; returns it, that sum, and the norm's logits."""
        normed, total, logits = norm_router(
            x, residual, norm.weight, norm.eps, self.weight, offset=norm.offset
        )
        return normed, total, Routing(logits, self.config, self.bias)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        slots = [plain_slot(prefix + "weight", self.weight)]
        if self.bias is not None:
            slots.append(plain_slot(prefix + "e_score_correction_bias", self.bias))
        return slots


class Experts(nn.Module):
    """The matrices of all experts; their intermediate features are split over ranks.

    A checkpoint stores each matrix of each expert as a tensor, or two tensors of all experts:
    ``gate_up_proj`` ``(E, 2 * I, hidden)`` and ``down_proj`` ``(E, hidden, I)``, perhaps with their last two
    axes swapped.

    Args:
        first: the number of the first one in the checkpoint.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        count: int,
        activation: str,
        build: BuildContext,
        *,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.activation = activation
        size = build.share(intermediate, "intermediate size of experts")
        start = build.tp.rank * size
        gate, up = (
            ExpertPart(name, intermediate, start, size, total_inputs=hidden, inputs=hidden)
            for name in ("gate_proj", "up_proj")
        )
        down = ExpertPart("down_proj", hidden, 0, hidden, total_inputs=intermediate, inputs=size, first=start)
        self.gate_up_proj = ExpertWeights("gate_up_proj", (gate, up), count, build, first=first)
        self.down_proj = ExpertWeights("down_proj", (down,), count, build, first=first)

    def finish_loading(self) -> None:
        """Have the inner features in the order in which ``down_proj`` has its inputs."""
        order = self.down_proj.take_order()
        if order is not None:
            self.gate_up_proj.reorder_outputs(torch.cat([order, order + order.shape[1]], dim=1))

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Compute this rank's share of the sum over experts; see :func:`engine.kernels.dispatch.experts`."""
        return experts(x, routing, self.gate_up_proj.matrices, self.down_proj.matrices, self.activation)


class ExpertsMLP(nn.Module):
    """Router, experts, and the shared expert if there is one; results are added up over ranks once.

    Shapes depend on the number of tokens alone, and nothing is read on the host, so it may be captured.
    """

    make_router = Router

    def __init__(self, hidden: int, config: ExpertsConfig, activation: str, build: BuildContext) -> None:
        super().__init__()
        self.tp = build.tp
        self.gate = self.make_router(hidden, config.router, build)
        self.experts = Experts(
            hidden, config.intermediate_size, config.router.num_experts, activation, build.at("experts")
        )
        self.shared_expert = None
        if config.shared_size is not None:
            self.shared_expert = GatedMLP(hidden, config.shared_size, activation, build.at("shared_expert"))
        self.averaged = config.averaged
        self.shared_expert_gate = Linear(hidden, 1, build, bias=False) if config.shared_gate else None

    def idle_parameters(self) -> int:
        """Count the parameters of the experts that a token doesn't use."""
        count = sum(parameter.numel() for parameter in self.experts.parameters())
        config = self.gate.config
        return count - count * config.top_k // config.num_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._mixture(x, self.gate(x))

    def _mixture(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self._with_shared(self.experts(x, routing), x)

    def _with_shared(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add up over ranks ``out``, a rank's share, and what the shared expert makes of ``x``."""
        if self.shared_expert is not None:
            shared = self.shared_expert.partial(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            out = out + shared
        if self.averaged:
            out = out / 2
        return out if self.tp.size == 1 else self.tp.all_reduce(out)

    def after_norm(
        self, norm: RMSNorm, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mixture of ``norm(x + residual)``; returns it and that sum, both ``(T, hidden)``."""
        normed, total, routing = self.gate.after_norm(norm, whole(x), residual)
        return self._mixture(normed, routing), total
