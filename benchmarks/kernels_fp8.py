"""Linear layers with fp8 weights: of decode steps, and with as many rows as a prompt has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.device import MEMORY_BOUND_ROWS
from engine.kernels.dispatch import linear, norm_linear
from engine.kernels.fp8 import FP8, Scale, dequantise
from engine.kernels.fp8_mma import MAX_ROWS
from engine.kernels.norm_gemv import norm_linear_reference
from engine.kernels.skinny_gemm import split_counters

#: Layers of Qwen2-VL-7B, and a square one: (name, input features, output features)
LAYERS = [("qkv", 3584, 4608), ("gate_up", 3584, 37888), ("down", 18944, 3584), ("square", 4096, 4096)]
TINY_LAYERS = [("tiny", 48, 80)]
BATCHES, TINY_BATCHES = (1, 4, 16, 64, 4096), (1, 4, 65)
#: Rows of a prompt, with a tile for each SM, and of an image, with several rounds of tiles: (kernel, rows,
#: input features, output features)
TILED = [
    ("even_gemm", 512, 3584, 4608),
    ("even_gemm", 512, 1536, 2048),
    ("even_gemm", 512, 8960, 1536),
    ("cublaslt", 1664, 1280, 3840),
    ("cublaslt", 1664, 1280, 5120),
]
TINY_TILED = [("even_gemm", 65, 48, 80), ("cublaslt", 66, 48, 80)]
#: Inputs that share a scale; None for all inputs of an output.
GROUPS = (None, 128)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for name, inputs, outputs in TINY_LAYERS if tiny else LAYERS:
        for group in GROUPS:
            label = f"{name} {inputs}->{outputs}, {'outputs' if group is None else 'blocks'}"
            for batch in TINY_BATCHES if tiny else BATCHES:
                sizes = (device, batch, inputs, outputs, group)
                kernel = "fp8_mma" if group is None and batch <= MAX_ROWS else "fp8"
                yield Case(kernel, f"{label}, {batch}", partial(plain, *sizes))
            yield Case("fp8", f"{label}, norm", partial(after_norm, device, inputs, outputs, group))
    for kernel, rows, inputs, outputs in TINY_TILED if tiny else TILED:
        label = f"{inputs}->{outputs}, outputs, {rows}"
        yield Case(kernel, label, partial(plain, device, rows, inputs, outputs, None))


class Layer:
    """An fp8 weight with scales, and its input; inputs may be rounded to fp8 too."""

    def __init__(
        self, device: torch.device, batch: int, inputs: int, outputs: int, group: int | None
    ) -> None:
        self.x = torch.randn((batch, inputs), device=device, dtype=dtype_on(device))
        self.weight = (torch.randn((outputs, inputs), device=device) * 30).to(FP8)
        groups = 1 if group is None else -(-inputs // group)
        values = (torch.rand((outputs, groups), device=device) + 0.5) * inputs**-0.5 / 30
        self.scale = Scale(values, group or inputs, True)
        output_bytes = batch * outputs * self.x.element_size()
        self.moved = self.weight.nbytes + values.nbytes + self.x.nbytes + output_bytes
        self.plain = dequantise(self.weight, self.scale, self.x.dtype)


def plain(device: torch.device, batch: int, inputs: int, outputs: int, group: int | None) -> Problem:
    """Measure the linear layer alone, beside torch's with the same weight in the dtype of its input."""
    layer = Layer(device, batch, inputs, outputs, group)
    run = partial(linear, layer.x, layer.weight, scale=layer.scale, counters=split_counters(outputs, device))
    peers: dict[str, Work] = {"torch, 16 bits": partial(F.linear, layer.x, layer.plain)}

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        return run(), layer.x.float() @ dequantise(layer.weight, layer.scale, torch.float32).T

    if batch > MEMORY_BOUND_ROWS:
        return Problem(run, check, 2 * batch * inputs * outputs, compute=True, peers=peers)
    return Problem(run, check, layer.moved, peers=peers)


def after_norm(device: torch.device, inputs: int, outputs: int, group: int | None) -> Problem:
    """Measure the linear layer of one row with the residual addition, the norm and the gate."""
    layer = Layer(device, 1, inputs, outputs, group)
    residual, norm = torch.randn_like(layer.x), torch.rand_like(layer.x[0]) + 0.5
    run = partial(
        norm_linear, layer.x, residual, norm, 1e-6, layer.weight, activation="silu", scale=layer.scale
    )
    apart = partial(norm_linear_reference, layer.x, residual, norm, 1e-6, layer.plain, activation="silu")
    peers: dict[str, Work] = {"apart, 16 bits": apart}
    return Problem(lambda: run()[0], lambda: (run()[0], apart()[0].float()), layer.moved, peers=peers)
