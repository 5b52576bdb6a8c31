"""Linear layers with weights in 4 bits: of decode steps, and with as many rows as a prompt has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels import int4_mma, int4_mma_ring, int4_wgmma
from engine.kernels.device import use_triton
from engine.kernels.dispatch import MAX_INT4_ROWS, linear
from engine.kernels.int4 import Int4Scale, Kind, dequantise_int4, pack
from engine.kernels.int4_gemv import int4_gemv_triton
from engine.kernels.skinny_gemm import split_counters

#: Layers of Qwen2-VL-7B, and a square one: (name, input features, output features)
LAYERS = [("qkv", 3584, 4608), ("gate_up", 3584, 37888), ("down", 18944, 3584), ("square", 4096, 4096)]
TINY_LAYERS = [("tiny", 64, 80)]
#: Layers of Qwen2-VL-72B, Qwen2.5-VL-32B and Mistral Small 24B.
LARGE_LAYERS = [
    ("72B qkv", 8192, 10240), ("72B o", 8192, 8192), ("72B gate_up", 8192, 59136), ("72B down", 29568, 8192),
    ("32B gate_up", 5120, 55296), ("32B down", 27648, 5120),
    ("24B gate_up", 5120, 65536), ("24B down", 32768, 5120),
]  # fmt: skip
BATCHES, TINY_BATCHES = (1, 4, 16, 64, 128, 256, 4096), (1, 20, 129)
#: Rows of a large layer.
LARGE_BATCHES = (1, 2, 4, 8, 16, 64)
#: Inputs that share a scale, and whether there are zero points: as in AWQ, and in symmetric GPTQ.
SCHEMES = (("groups of 128, zeros", 128, True), ("groups of 128", 128, False), ("groups of 32", 32, False))
#: Kinds of floats, and inputs that share a scale.
FLOATS: tuple[tuple[Kind, int], ...] = (("mxfp4", 32), ("nvfp4", 16))


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for name, inputs, outputs in TINY_LAYERS if tiny else LAYERS:
        for scheme, group, zeros in SCHEMES:
            for batch in TINY_BATCHES if tiny else BATCHES:
                build = partial(problem, device, batch, inputs, outputs, group, zeros)
                label = f"{name} {inputs}->{outputs}, {scheme}, {batch}"
                yield Case(_kernel("int4", group, batch, outputs), label, build)
                if batch == 1:
                    yield Case("int4_gemv", label, partial(build, other=int4_gemv_triton))
        for kind, group in FLOATS:
            for batch in TINY_BATCHES if tiny else BATCHES:
                build = partial(problem, device, batch, inputs, outputs, group, False, kind)
                yield Case(
                    _kernel("fp4", group, batch, outputs),
                    f"{name} {inputs}->{outputs}, {kind}, {batch}",
                    build,
                )

    scheme, group, zeros = SCHEMES[0]
    for (name, inputs, outputs), batch in product([] if tiny else LARGE_LAYERS, LARGE_BATCHES):
        build = partial(problem, device, batch, inputs, outputs, group, zeros)
        yield Case(
            _kernel("int4", group, batch, outputs), f"{name} {inputs}->{outputs}, {scheme}, {batch}", build
        )


def _kernel(kind: str, group: int, batch: int, outputs: int) -> str:
    """The kernel of a batch, on a Hopper GPU."""
    if group >= 128 and batch <= int4_wgmma.MAX_ROWS:
        return "int4_mma_ring" if batch <= int4_mma_ring.most_rows(outputs) else "int4_wgmma"
    return f"{kind}_mma" if batch <= int4_mma.MAX_ROWS else f"{kind}_gemm" if batch <= MAX_INT4_ROWS else kind


def _scale(device: torch.device, inputs: int, outputs: int, group: int, zeros: bool, kind: Kind) -> Int4Scale:
    """Random scales of a weight ``(outputs, inputs)``."""
    shape = outputs, -(-inputs // group)
    if kind == "int4":
        values = ((torch.rand(shape, device=device) + 0.5) * inputs**-0.5 / 8).half()
        points = torch.randint(0, 16, shape, device=device, dtype=torch.uint8) if zeros else None
        return Int4Scale(inputs, values, group, points).paired()
    low, high = (118, 121) if kind == "mxfp4" else (56, 72)
    values = torch.randint(low, high, shape, device=device, dtype=torch.uint8)
    factors = torch.full((outputs,), inputs**-0.5 / 4, device=device) if kind == "nvfp4" else None
    return Int4Scale(inputs, values, group, kind=kind, factors=factors)


def problem(
    device: torch.device,
    batch: int,
    inputs: int,
    outputs: int,
    group: int,
    zeros: bool,
    kind: Kind = "int4",
    other: Callable[..., torch.Tensor] | None = None,
) -> Problem:
    """Measure the linear layer, beside torch's with the same weight in the dtype of its input.

    Args:
        other: a kernel to measure on a GPU instead of the one that is chosen.
    """
    x = torch.randn((batch, inputs), device=device, dtype=dtype_on(device))
    words = pack(torch.randint(0, 16, (outputs, inputs), device=device, dtype=torch.uint8))
    scale = _scale(device, inputs, outputs, group, zeros, kind)
    plain = dequantise_int4(words, scale, x.dtype)
    run = partial(linear, x, words, scale=scale, counters=split_counters(outputs, device))
    if other is not None and use_triton(x):
        run = partial(other, x, words, scale)
    peers: dict[str, Work] = {"torch, 16 bits": partial(F.linear, x, plain)}

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        return run(), x.float() @ dequantise_int4(words, scale, torch.float32).T

    if batch > MAX_INT4_ROWS:
        return Problem(run, check, 2 * batch * inputs * outputs, compute=True, peers=peers)
    moved = words.nbytes + scale.values.nbytes + (0 if scale.zeros is None else scale.zeros.nbytes)
    return Problem(run, check, moved + x.nbytes + batch * outputs * x.element_size(), peers=peers)
