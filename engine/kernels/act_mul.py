"""Activations between the layers of an MLP: the gated one, ``activation(gate) * up``, and rounding of both kinds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.activation import ACTIVATIONS, activate
from engine.kernels.device import use_triton
from engine.kernels.fp8 import RoundedRows, quantise_rows_reference, reads_fp8, round_rows
from engine.kernels.launch import launch
from engine.kernels.pdl import launch_dependents_of_one_row, pdl_options, wait_for_previous


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


def act_rounded(x: torch.Tensor, activation: str, *, gated: bool) -> RoundedRows:
    """Compute an activation and round its rows to fp8.

    Args:
        x: ``(T, I)`` contiguous; with ``gated`` ``(T, 2 * I)``, see :func:`act_mul`.
        activation: a key of :data:`~engine.kernels.activation.ACTIVATIONS`. With ``gated`` results are rounded to the
            dtype of ``x`` first, as there.
    """
    run = use_triton(x) and reads_fp8(x.device)
    return (act_rounded_triton if run else act_rounded_reference)(x, activation, gated=gated)


def act_rounded_reference(x: torch.Tensor, activation: str, *, gated: bool) -> RoundedRows:
    return quantise_rows_reference(act_mul_reference(x, activation) if gated else ACTIVATIONS[activation](x))


def act_rounded_triton(x: torch.Tensor, activation: str, *, gated: bool) -> RoundedRows:
    assert x.is_contiguous()
    return round_rows(x, x.shape[1] // 2 if gated else x.shape[1], activation, gated=gated)


@triton.jit
def _product(gate, up, ACTIVATION: tl.constexpr):
    """The product in the dtype of ``gate``."""
    active = activate(gate.to(tl.float32), ACTIVATION)
    return (active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _act_mul_kernel(in_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents_of_one_row(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(in_ptr + row * 2 * size + column, mask=mask)
    up = tl.load(in_ptr + row * 2 * size + size + column, mask=mask)
    tl.store(out_ptr + row * size + column, _product(gate, up, ACTIVATION), mask=mask)
