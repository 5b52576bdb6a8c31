"""Linear layers of decode size: a few rows against a weight that has to be read in full. Inner layers of
towers: many rows, and an activation after the product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.act_mul import act_mul, act_mul_reference
from engine.kernels.linear import arrivals_of, linear
from engine.kernels.many_rows import activated_linear, activated_linear_reference
from engine.kernels.norm_linear import norm_linear, norm_linear_reference
from engine.kernels.quick_gelu import quick_gelu_reference

#: Layers of Qwen2-VL's 2B and 7B: (name, input features, output features)
LAYERS = [
    ("qkv", 1536, 2048),
    ("o", 1536, 1536),
    ("gate_up", 1536, 17920),
    ("down", 8960, 1536),
    ("head", 1536, 151936),
    ("7B gate_up", 3584, 37888),
    ("7B down", 18944, 3584),
]
TINY_LAYERS = [("tiny", 48, 80)]
AFTER_NORM = ("qkv", "gate_up", "7B gate_up", "tiny")
BATCHES = (1, 4, 16, 64)
#: Inner layers of the towers of Qwen2-VL and LLaVA: (tokens, input features, output features)
TOWERS = [(1600, 1280, 5120), (25600, 1280, 5120), (9232, 1024, 4096)]
TINY_TOWERS = [(130, 48, 80)]


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for name, inputs, outputs in TINY_LAYERS if tiny else LAYERS:
        for batch in BATCHES:
            label, sizes = f"{name} {inputs}->{outputs}, batch {batch}", (device, batch, inputs, outputs)
            yield Case("linear", label, partial(plain, *sizes))
            if name in AFTER_NORM and batch > 1:
                yield Case("few_rows", f"{label}, gated", partial(gated, *sizes))
        if name in AFTER_NORM:
            yield Case(
                "norm_linear", f"{name} {inputs}->{outputs}", partial(after_norm, device, inputs, outputs)
            )
    for tokens, inputs, outputs in TINY_TOWERS if tiny else TOWERS:
        label = f"{inputs}->{outputs} with GELU, {tokens} rows"
        yield Case("many_rows", label, partial(activated, device, tokens, inputs, outputs))


class Layer:
    """A weight and what goes through it."""

    def __init__(self, device: torch.device, batch: int, inputs: int, outputs: int) -> None:
        self.x = torch.randn((batch, inputs), device=device, dtype=dtype_on(device))
        self.weight = torch.randn((outputs, inputs), device=device, dtype=self.x.dtype) * inputs**-0.5
        self.moved = self.weight.nbytes + self.x.nbytes + batch * outputs * self.x.element_size()

    def wanted(self) -> torch.Tensor:
        return self.x.float() @ self.weight.float().T


def plain(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """The product alone."""
    layer = Layer(device, batch, inputs, outputs)
    run = partial(linear, layer.x, layer.weight, arrivals=arrivals_of(outputs, device))
    peers: dict[str, Work] = {"torch": partial(F.linear, layer.x, layer.weight)}
    return Problem(run, lambda: (run(), layer.wanted()), layer.moved, peers=peers)


def gated(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """The product of a few rows with the gate after it."""
    layer = Layer(device, batch, inputs, outputs)
    run = partial(linear, layer.x, layer.weight, activation="silu")

    def apart() -> torch.Tensor:
        return act_mul(F.linear(layer.x, layer.weight))

    peers: dict[str, Work] = {"torch, gate apart": apart}
    return Problem(run, lambda: (run(), act_mul_reference(layer.wanted())), layer.moved, peers=peers)


def activated(device: torch.device, tokens: int, inputs: int, outputs: int) -> Problem:
    """The product of many rows with the activation after it."""
    layer = Layer(device, tokens, inputs, outputs)
    bias = torch.randn(outputs, device=device, dtype=layer.x.dtype)

    given = (layer.x, layer.weight, bias, "quick_gelu")
    run, operations = partial(activated_linear, *given), 2 * tokens * inputs * outputs
    peers: dict[str, Work] = {"torch, GELU apart": partial(activated_linear_reference, *given)}
    wanted = partial(quick_gelu_reference, layer.wanted() + bias)
    return Problem(run, lambda: (run(), wanted()), operations, compute=True, peers=peers)


def after_norm(device: torch.device, inputs: int, outputs: int) -> Problem:
    """The product of one row, with the residual sum, the norm and the gate around it."""
    layer = Layer(device, 1, inputs, outputs)
    residual, norm = torch.randn_like(layer.x), torch.rand_like(layer.x[0]) + 0.5
    given = (layer.x, residual, norm, 1e-6, layer.weight)
    run = partial(norm_linear, *given, activation="silu")
    apart = partial(norm_linear_reference, *given, activation="silu")
    return Problem(
        lambda: run()[0], lambda: (run()[0], apart()[0].float()), layer.moved, peers={"apart": apart}
    )
