"""Linear layers of decode size: a few rows against a weight that has to be read in full."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, dtype_on

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
            label = f"{name} {inputs}->{outputs}, batch {batch}"
            yield Case("linear", label, partial(linear, device, batch, inputs, outputs))


def linear(device, batch, inputs, outputs) -> Problem:
    """The product as layers compute it."""
    dtype = dtype_on(device)
    x = torch.randn((batch, inputs), device=device, dtype=dtype)
    weight = torch.randn((outputs, inputs), device=device, dtype=dtype) * inputs**-0.5
    run = partial(F.linear, x, weight)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        return run(), x.float() @ weight.float().T

    amount = weight.nbytes + x.nbytes + batch * outputs * x.element_size()
    return Problem(run, check, amount)
