"""Compiles the engine's kernels for a Hopper GPU where there is none, and prints what each needs.

    python -m tests.engine.kernels.hopper

One JSON object per line: the kernel, its registers per thread, and the bytes of its stack, which hold what
did not fit into registers. Sizes are those of public models. Nothing runs: a launch ends when the compiler is
through.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.kernels import overlap, tiling

TARGET = GPUTarget("cuda", 90, 32)
BF16, I32 = torch.bfloat16, torch.int32


class NoDevice:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(BF16)


def paged(heads: int, kv_heads: int, dim: int, tokens: list[int]) -> None:
    from engine.kernels.paged_attention import paged_attention_triton

    count = len(tokens)
    starts = torch.tensor([0, *tokens]).cumsum(0).to(I32)
    tables, lengths = torch.zeros(count, 64, dtype=I32), torch.full((count,), 1000, dtype=I32)
    cache = noise(2, kv_heads, 16, dim)
    paged_attention_triton(
        noise(sum(tokens), heads, dim),
        cache,
        cache,
        tables,
        starts,
        lengths,
        scale=0.1,
    )


def prefill(heads: int, kv_heads: int, dim: int) -> None:
    from engine.kernels.prefill_attention import prefill_attention_gluon

    starts, cache = torch.tensor([0, 2000], dtype=I32), noise(2, kv_heads, 16, dim)
    q, tables = noise(2000, heads, dim), torch.zeros(1, 128, dtype=I32)
    prefill_attention_gluon(q, cache, cache, tables, starts, starts[1:], scale=0.1)


def decode(heads: int, kv_heads: int, dim: int, sequences: int) -> None:
    from engine.kernels.decode_attention import decode_attention_triton

    q, k, v = noise(sequences, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    cache, angles = noise(2, kv_heads, 16, dim), torch.randn(64, dim // 2)
    decode_attention_triton(
        q,
        k,
        v,
        torch.zeros(3, sequences, dtype=torch.int64),
        angles,
        angles,
        cache,
        cache,
        torch.zeros(sequences, dtype=torch.int64),
        torch.zeros(sequences, 64, dtype=I32),
        torch.full((sequences,), 1000, dtype=I32),
        scale=0.1,
        max_seq_len=4096,
        mrope_section=(16, 24, 24),
    )


def vision(heads: int, dim: int, tokens: int, pictures: int = 1) -> None:
    from engine.kernels.vision_attention import vision_attention_triton

    q, k, v = noise(pictures * tokens, 3 * heads, dim).split(heads, dim=1)
    bounds = (torch.arange(pictures + 1) * tokens).to(I32)
    vision_attention_triton(q, k, v, bounds, max_len=tokens, scale=0.1)


def moving() -> None:
    """What only moves data."""
    from engine.kernels.act_mul import act_mul_triton
    from engine.kernels.kv_write import rotary_kv_write_triton
    from engine.kernels.layer_norm import add_layer_norm_triton
    from engine.kernels.patchify import patchify_triton
    from engine.kernels.quick_gelu import quick_gelu_triton
    from engine.kernels.rms_norm import rms_norm_triton
    from engine.kernels.rotary import rotary_triton

    x = noise(4, 3584)
    rms_norm_triton(x, x[0], 1e-6)
    rms_norm_triton(x, x[0], 1e-6, x)
    x = noise(4, 1280)
    add_layer_norm_triton(x, x, x[0], x[0], 1e-6)
    quick_gelu_triton(noise(4, 5120))
    pixels = torch.zeros(560, 560, 3, dtype=torch.uint8)
    patchify_triton(pixels, noise(3 * 256), patch=14, merge=2, temporal=2)
    patchify_triton(pixels[None], noise(3 * 256), patch=14, merge=1, temporal=1)
    act_mul_triton(noise(4, 17920))
    cos = torch.randn(64, 64)
    q, k, v = noise(4, 16, 128).split([12, 2, 2], dim=1)
    positions, slots, cache = (
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        noise(2, 2, 16, 128),
    )
    rotary_kv_write_triton(q, k, v, positions, cos, cos, cache, cache, slots, mrope_section=(16, 24, 24))
    q, k = noise(4, 32, 80).split(16, dim=1)
    rotary_triton(q, k, positions[0], cos[:, :40], cos[:, :40])


def activating(rows: int, inputs: int, outputs: int, activation: str) -> None:
    from engine.kernels.many_rows import activated_linear_triton

    activated_linear_triton(noise(rows, inputs), noise(outputs, inputs), noise(outputs), activation)


def choosing() -> None:
    """What chooses tokens, and the products of a decode step."""
    from engine.kernels.decode_state import advance_triton, decode_places_triton
    from engine.kernels.few_rows import few_rows_linear_triton
    from engine.kernels.gumbel import argmax_triton, gumbel_argmax_triton
    from engine.kernels.linear import arrivals_of, linear_triton
    from engine.kernels.norm_linear import norm_linear_triton
    from engine.kernels.truncation import truncation_threshold_triton

    logits, ones = noise(4, 151936), torch.ones(4)
    ids = torch.ones(4, dtype=torch.int64)
    truncation_threshold_triton(logits, ones, ids, ones, ones)
    gumbel_argmax_triton(logits, ones, ids, ids, ones)
    argmax_triton(logits)
    tables = torch.zeros(9, 256, dtype=I32)
    decode_places_triton(ids, tables, ids, ids, ids, block_size=16)
    advance_triton(ids, ids, ids, ids, padding_slot=3)
    x, norm = noise(1, 1536), noise(1536)
    linear_triton(noise(1, 8960), noise(1536, 8960))
    norm_linear_triton(x, x, norm, 1e-6, noise(2048, 1536), noise(2048))
    norm_linear_triton(x, x, norm, 1e-6, noise(17920, 1536), activation="silu")
    x, norm = noise(1, 3584), noise(3584)
    linear_triton(x, noise(3584, 3584))
    norm_linear_triton(x, x, norm, 1e-6, noise(37888, 3584), activation="silu")
    for rows in (16, 64):
        few_rows_linear_triton(noise(rows, 1536), noise(17920, 1536), activation="silu")
        few_rows_linear_triton(noise(rows, 1536), noise(2048, 1536), noise(2048))
        few_rows_linear_triton(
            noise(rows, 8960), noise(1536, 8960), arrivals=arrivals_of(1536, torch.device("cpu"))
        )


CASES: list[Callable[[], None]] = [
    moving,
    choosing,
    # Programs with a processor each, some, and so many that they are cut smaller and nothing is split.
    lambda: decode(12, 2, 128, 1),
    lambda: decode(28, 4, 128, 1),
    lambda: decode(32, 32, 128, 1),
    lambda: decode(12, 2, 128, 64),
    lambda: decode(12, 2, 128, 256),
    lambda: decode(32, 32, 128, 64),
    lambda: paged(28, 4, 128, [300, 1, 7]),
    lambda: paged(32, 32, 128, [300, 1, 7]),
    lambda: prefill(28, 4, 128),
    lambda: prefill(14, 2, 64),
    lambda: vision(16, 80, 1600),
    lambda: vision(16, 80, 1600, pictures=4),
    lambda: vision(16, 64, 577),
    lambda: vision(16, 72, 1024),
    *(
        partial(activating, 4096, 1280, 5120, activation)
        for activation in ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
    ),
]


def resources(binary: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack, read from a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    driver.set_active(NoDevice())
    overlap._can_overlap = lambda device: True
    tiling._PROCESSORS_WITHOUT_GPU = 132
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.__name__, **resources(kernel.asm["cubin"])}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for case in CASES:
        case()


if __name__ == "__main__":
    sys.exit(main())
