"""Linear layers of decode size: a few rows against a weight that has to be read in full."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.skinny_linear import MAX_ROWS, skinny_linear

#: Layers of Qwen2-VL-2B: (name, input features, output features)
LAYERS = [
    ("qkv", 1536, 2048),
    ("o", 1536, 1536),
    ("gate_up", 1536, 17920),
    ("down", 8960, 1536),
    ("head", 1536, 151936),
]
TINY_LAYERS = [("tiny", 48, 80)]
BATCHES = (1, 4, 16, 64)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for name, inputs, outputs in TINY_LAYERS if tiny else LAYERS:
        for batch in BATCHES:
            label, sizes = f"{name} {inputs}->{outputs}, batch {batch}", (device, batch, inputs, outputs)
            yield Case("linear", label, partial(linear, *sizes))
            if batch <= MAX_ROWS:
                yield Case("skinny_linear", label, partial(skinny, *sizes))


class Layer:
    """A weight and what goes through it."""

    def __init__(self, device: torch.device, batch: int, inputs: int, outputs: int) -> None:
        self.x = torch.randn((batch, inputs), device=device, dtype=dtype_on(device))
        self.weight = torch.randn((outputs, inputs), device=device, dtype=self.x.dtype) * inputs**-0.5
        self.moved = self.weight.nbytes + self.x.nbytes + batch * outputs * self.x.element_size()

    def wanted(self) -> torch.Tensor:
        return self.x.float() @ self.weight.float().T


def linear(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """The product as layers compute it."""
    layer = Layer(device, batch, inputs, outputs)
    run = partial(F.linear, layer.x, layer.weight)
    return Problem(run, lambda: (run(), layer.wanted()), layer.moved)


def skinny(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """The product by the kernel for few rows."""
    layer = Layer(device, batch, inputs, outputs)
    run = partial(skinny_linear, layer.x, layer.weight)
    peers: dict[str, Work] = {"torch": partial(F.linear, layer.x, layer.weight)}
    return Problem(run, lambda: (run(), layer.wanted()), layer.moved, peers=peers)
