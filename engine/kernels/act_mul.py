"""Gated activation of an MLP: ``activation(gate) * up``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.activation import ACTIVATIONS, activate
from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous


def act_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Apply ``activation`` to the first half of the last dimension and multiply by the second.

    Args:
        gate_up: ``(T, 2 * I)`` contiguous, gate first.
        activation: a key of :data:`~engine.kernels.activation.ACTIVATIONS`.

    Returns:
        ``(T, I)``. The activation is rounded to the input's dtype before the multiplication, as in
        Transformers.
    """
    assert activation in ACTIVATIONS, activation
    run = act_mul_triton if use_triton(gate_up) else act_mul_reference
    return run(gate_up, activation)


def act_mul_reference(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    # Quick GELU has a kernel of its own, which takes whole rows.
    return ACTIVATIONS[activation](gate.contiguous()) * up


def act_mul_triton(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        launch(
            _act_mul_kernel, (rows, triton.cdiv(size, block)),
            in_ptr=gate_up, out_ptr=out, size=size, ACTIVATION=activation, BLOCK=block,
            num_warps=4, **pdl_options(gate_up),
        )  # fmt: skip
    return out


@triton.jit
def _act_mul_kernel(in_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(in_ptr + row * 2 * size + column, mask=mask)
    up = tl.load(in_ptr + row * 2 * size + size + column, mask=mask)
    active = activate(gate.to(tl.float32), ACTIVATION)
    result = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + column, result.to(gate.dtype), mask=mask)
