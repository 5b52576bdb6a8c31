"""Linear layers: of decode steps, with few rows, and of vision towers, with many rows and an activation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.act_mul import act_mul, act_mul_reference
from engine.kernels.device import MEMORY_BOUND_ROWS
from engine.kernels.dispatch import (
    MAX_SKINNY_OUTPUTS,
    activated_linear,
    linear,
    norm_linear,
    split_linear,
)
from engine.kernels.gemm_activation import gemm_activation_reference
from engine.kernels.norm_gemv import norm_linear_reference
from engine.kernels.quick_gelu import quick_gelu_reference
from engine.kernels.rms_norm import rms_norm
from engine.kernels.skinny_gemm import split_counters

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
TINY_LAYERS = [("tiny", 48, 80), ("tiny head", 8, MAX_SKINNY_OUTPUTS + 8)]
AFTER_NORM = ("qkv", "gate_up", "7B gate_up", "tiny")
BEFORE_NORM = ("o", "down", "7B down", "tiny")
#: Gated layers whose outputs all SMs share evenly, of over 16 rows.
SHARED = ("7B gate_up", "tiny")
BATCHES = (1, 4, 16, 64)
#: First MLP layers of the towers of Qwen2-VL and LLaVA: (tokens, input features, output features)
TOWERS = [(1600, 1280, 5120), (25600, 1280, 5120), (9232, 1024, 4096)]
TINY_TOWERS = [(130, 48, 80)]
#: Gated MLPs of Qwen2-VL's 2B and 7B, of prompts: (tokens, input features, output features)
GATES = [(512, 1536, 17920), (8192, 1536, 17920), (512, 3584, 37888), (8192, 3584, 37888)]
TINY_GATES = [(70, 48, 80)]


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for name, inputs, outputs in TINY_LAYERS if tiny else LAYERS:
        for batch in BATCHES:
            label, sizes = f"{name} {inputs}->{outputs}, batch {batch}", (device, batch, inputs, outputs)
            yield Case(kernel_of(batch, outputs), label, partial(plain, *sizes))
            if name in AFTER_NORM and batch > 1:
                kernel = "ring_shares" if name in SHARED and batch > 16 else "skinny_gemm"
                yield Case(kernel, f"{label}, gated", partial(gated, *sizes))
            if name in BEFORE_NORM and batch > 1:
                yield Case("ring_gemm", f"{label}, with the norm after it", partial(before_norm, *sizes))
        if name in AFTER_NORM:
            yield Case(
                "norm_gemv", f"{name} {inputs}->{outputs}", partial(after_norm, device, inputs, outputs)
            )
    for tokens, inputs, outputs in TINY_TOWERS if tiny else TOWERS:
        label = f"{inputs}->{outputs} with GELU, {tokens} rows"
        yield Case("gemm_activation", label, partial(activated, device, tokens, inputs, outputs))
    for tokens, inputs, outputs in TINY_GATES if tiny else GATES:
        label = f"{inputs}->{outputs}, {tokens} rows, gated"
        yield Case("wide_gemm", label, partial(gated, device, tokens, inputs, outputs))


def kernel_of(batch: int, outputs: int) -> str:
    """Return the kernel of a linear layer on a GPU; ``linear`` where torch computes it."""
    if batch == 1:
        return "gemv"
    return "skinny_gemm" if outputs <= MAX_SKINNY_OUTPUTS else "linear"


class Layer:
    """A weight and its input."""

    def __init__(self, device: torch.device, batch: int, inputs: int, outputs: int) -> None:
        self.x = torch.randn((batch, inputs), device=device, dtype=dtype_on(device))
        self.weight = torch.randn((outputs, inputs), device=device, dtype=self.x.dtype) * inputs**-0.5
        self.moved = self.weight.nbytes + self.x.nbytes + batch * outputs * self.x.element_size()

    def expected(self) -> torch.Tensor:
        """Compute the output in float32."""
        return self.x.float() @ self.weight.float().T


def plain(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """Measure the linear layer alone."""
    layer = Layer(device, batch, inputs, outputs)
    run = partial(linear, layer.x, layer.weight, counters=split_counters(outputs, device))
    peers: dict[str, Work] = {"torch": partial(F.linear, layer.x, layer.weight)}
    return Problem(run, lambda: (run(), layer.expected()), layer.moved, peers=peers)


def gated(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """Measure the linear layer with the gate after it: bytes of a few rows, operations of many."""
    layer, many = Layer(device, batch, inputs, outputs), batch > MEMORY_BOUND_ROWS
    amount = 2 * batch * inputs * outputs if many else layer.moved
    run = partial(linear, layer.x, layer.weight, activation="silu")

    def apart() -> torch.Tensor:
        return act_mul(F.linear(layer.x, layer.weight))

    peers: dict[str, Work] = {"torch, then gate": apart}
    return Problem(
        run, lambda: (run(), act_mul_reference(layer.expected())), amount, compute=many, peers=peers
    )


def before_norm(device: torch.device, batch: int, inputs: int, outputs: int) -> Problem:
    """Measure the linear layer and the norm after it, which adds up its sums and a residual."""
    layer = Layer(device, batch, inputs, outputs)
    norm, residual = layer.x.new_ones(outputs), torch.randn((batch, outputs), device=device).to(layer.x.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(split_linear(layer.x, layer.weight), norm, 1e-6, residual)

    def apart() -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(F.linear(layer.x, layer.weight), norm, 1e-6, residual)

    peers: dict[str, Work] = {"torch, then norm": apart}
    return Problem(run, lambda: (run()[1], layer.expected() + residual.float()), layer.moved, peers=peers)


def activated(device: torch.device, tokens: int, inputs: int, outputs: int) -> Problem:
    """Measure the linear layer of many rows with the activation after it."""
    layer = Layer(device, tokens, inputs, outputs)
    bias = torch.randn(outputs, device=device, dtype=layer.x.dtype)

    arguments = (layer.x, layer.weight, bias, "quick_gelu")
    run, operations = partial(activated_linear, *arguments), 2 * tokens * inputs * outputs
    peers: dict[str, Work] = {"torch, then GELU": partial(gemm_activation_reference, *arguments)}
    expected = partial(quick_gelu_reference, layer.expected() + bias)
    return Problem(run, lambda: (run(), expected()), operations, compute=True, peers=peers)


def after_norm(device: torch.device, inputs: int, outputs: int) -> Problem:
    """Measure the linear layer of one row with the residual addition, the norm and the gate."""
    layer = Layer(device, 1, inputs, outputs)
    residual, norm = torch.randn_like(layer.x), torch.rand_like(layer.x[0]) + 0.5
    arguments = (layer.x, residual, norm, 1e-6, layer.weight)
    run = partial(norm_linear, *arguments, activation="silu")
    apart = partial(norm_linear_reference, *arguments, activation="silu")
    return Problem(
        lambda: run()[0], lambda: (run()[0], apart()[0].float()), layer.moved, peers={"apart": apart}
    )
