"""A mixture of experts for text, and one for tokens of images and videos (Ernie 4.5 VL)."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.kernels.split_sums import Unfinished, whole
from engine.layers.build import BuildContext, Region, Target, WeightSlot
from engine.layers.build import whole as whole_tensor
from engine.layers.experts import Experts, ExpertsMLP, Router
from engine.layers.experts_config import ExpertsConfig
from engine.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class Modalities:
    """Rows of a step's tokens by modality. A row that is in neither list is padding.

    Attributes:
        text, vision: int64 ``(N,)``, rows of the step's tokens.
    """

    text: torch.Tensor
    vision: torch.Tensor


class TransposedRouter(Router):
    """A router whose weight is stored transposed, and whose bias is stored with that of another router."""

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        stored = self.weight.data.t()
        return [WeightSlot(prefix + "weight", tuple(stored.shape), [(whole_tensor(stored.shape), stored)])]


class VisionExperts(nn.Module):
    """The experts of tokens of images and videos, with their router.

    A checkpoint counts them on from the experts of text.
    """

    def __init__(self, hidden: int, config: ExpertsConfig, activation: str, build: BuildContext) -> None:
        super().__init__()
        assert config.vision_size is not None
        count = config.router.num_experts
        self.gate = TransposedRouter(hidden, config.router, build)
        self.experts = Experts(
            hidden, config.vision_size, count, activation, build.at("experts"), first=count
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute this rank's share of the mixture of ``(T, hidden)``."""
        return self.experts(x, self.gate(x))


class SplitExperts(ExpertsMLP):
    """Experts of text, which generated tokens have, those of images and videos, and a shared one of all.

    Without tokens of images and videos the step is that of :class:`ExpertsMLP`.
    """

    make_router = TransposedRouter

    def __init__(self, hidden: int, config: ExpertsConfig, activation: str, build: BuildContext) -> None:
        super().__init__(hidden, config, activation, build)
        self.dtype = build.dtype
        self.vision = VisionExperts(hidden, config, activation, build.at("vision"))

    def idle_parameters(self) -> int:
        """Count the parameters of the experts that a token of text doesn't use."""
        return super().idle_parameters() + sum(each.numel() for each in self.vision.parameters())

    def of_modalities(
        self,
        norm: RMSNorm,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        modalities: Modalities,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute :meth:`after_norm` of tokens of which some are an image's or a video's."""
        normed, total, routing = self.gate.after_norm(norm, whole(x), residual)
        text, vision = modalities.text, modalities.vision
        out = torch.zeros_like(normed)
        if len(text):
            of_text = replace(routing, logits=routing.logits.index_select(0, text))
            out.index_copy_(0, text, self.experts(normed.index_select(0, text), of_text))
        if len(vision):
            out.index_copy_(0, vision, self.vision(normed.index_select(0, vision)))
        return self._with_shared(out, normed), total

    def rehearse(self, counts: Iterable[int]) -> None:
        """Run the experts of both kinds for one token and for ``counts``, so that their kernels are
        compiled and loaded."""
        # A step may have one token of an image, or a few: both have kernels that steps of many don't.
        for count in (1, *counts):
            x = self.gate.weight.new_zeros(count, self.gate.weight.shape[1], dtype=self.dtype)
            self.vision(x)
            self.experts(x, self.gate(x))

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        """The biases of both routers, in one tensor."""
        count = self.gate.config.num_experts
        copies: list[tuple[Region, Target]] = [
            ((slice(row, row + 1), slice(0, count)), router.bias.data[None])
            for row, router in enumerate((self.gate, self.vision.gate))
            if router.bias is not None
        ]
        return [WeightSlot(prefix + "gate.e_score_correction_bias", (2, count), copies)]
