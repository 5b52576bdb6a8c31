"""The configuration of a mixture of experts. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.kernels.router_config import RouterConfig


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The layers of a decoder whose MLP is a mixture of experts.

    Attributes:
        router: chooses the experts of a token.
        intermediate_size: of one expert.
        layers: indices of the layers with experts; the others have a plain MLP.
        shared_size: intermediate size of the shared expert, which sees every token; None if there is none.
        shared_gate: the shared expert's result is multiplied by the sigmoid of a linear layer of the token.
        vision_size: intermediate size of one of the experts, as many, that tokens of images and videos have
            instead, chosen by a router of their own; None if all tokens have the same ones.
        vision_tokens: ids of these tokens, those around an item's rows included.
        averaged: the sum of the experts and the shared expert is halved.
        beside_mlp: these layers have a plain MLP as well; see :mod:`engine.layers.parallel_experts`.
    """

    router: RouterConfig
    intermediate_size: int
    layers: tuple[int, ...]
    shared_size: int | None = None
    shared_gate: bool = False
    vision_size: int | None = None
    vision_tokens: tuple[int, ...] = ()
    averaged: bool = False
    beside_mlp: bool = False
