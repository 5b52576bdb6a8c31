"""The configuration of a router of experts. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Options of the computation of a token's experts and their weights from its ``E`` router logits, in float32.

    In order: each expert's score is computed; the correction bias, if there is one, is added for the choice
    alone; of the groups of consecutive experts only the best are kept, by the sum of their two best
    experts; ``top_k`` experts are chosen; their scores are the weights.

    Attributes:
        num_experts, top_k: experts of a layer, and experts of a token.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each logit.
        renormalise: divide the weights of a token by their sum.
        scaling: factor of the weights after that.
        correction_bias: the layer has a bias for each expert (DeepSeek-V3, GLM-4.5).
        num_groups, top_groups: groups of experts, and how many of them are kept; equal numbers keep all.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scaling: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        assert self.num_experts % self.num_groups == 0
        assert 0 < self.top_k <= self.num_experts // self.num_groups * self.top_groups
