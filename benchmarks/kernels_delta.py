"""Gated delta nets: the short convolution, the delta rule of decode steps and of prompts, and the norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels_timing import Case, Problem, dtype_on
from engine.kernels.causal_conv import causal_conv, conv_reference
from engine.kernels.delta_rule import DeltaGates, delta_rule_reference
from engine.kernels.dispatch import delta_rule
from engine.kernels.gated_norm import gated_norm, gated_norm_reference
from engine.kernels.paged import AttentionMetadata
from engine.kernels.recurrent_state import StateCache

#: Key heads, value heads, width of a head, and of the convolution: those of Qwen3.5-4B.
SIZES, TINY_SIZES = (16, 32, 128, 4), (2, 4, 8, 4)
#: Sequences, and new tokens of each.
STEPS, TINY_STEPS = ((1, 1), (64, 1)), ((3, 1),)
PROMPTS, TINY_PROMPTS = ((1, 8192), (8, 512)), ((2, 19),)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    sizes = TINY_SIZES if tiny else SIZES
    steps, prompts = (TINY_STEPS, TINY_PROMPTS) if tiny else (STEPS, PROMPTS)
    for sequences, tokens in (*steps, *prompts):
        label = f"{sizes[1]} heads of {sizes[2]}, {sequences}x{tokens}"
        rule = "delta_rule" if tokens == 1 else "delta_prefill"
        yield Case(rule, label, partial(delta, device, sequences, tokens, *sizes))
        yield Case("causal_conv", label, partial(convolution, device, sequences, tokens, *sizes))
        yield Case("gated_norm", label, partial(norm, device, sequences * tokens, *sizes))


def _batch(device: torch.device, sequences: int, tokens: int) -> AttentionMetadata:
    """New tokens behind tokens that are in the states."""
    each = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    return AttentionMetadata(
        block_tables=torch.zeros((sequences, 1), dtype=torch.int32, device=device),
        query_start=each * tokens,
        seq_lens=torch.full((sequences,), tokens + 7, dtype=torch.int32, device=device),
        slot_mapping=torch.full((sequences * tokens,), -1, dtype=torch.int64, device=device),
        max_query_len=tokens,
        max_seq_len=tokens + 7,
        state_rows=torch.arange(sequences, device=device),
    )


def _states(device: torch.device, sequences: int, keys: int, heads: int, dim: int, width: int) -> StateCache:
    channels = (2 * keys + heads) * dim
    conv = torch.randn((sequences, width - 1, channels), device=device, dtype=dtype_on(device))
    return StateCache(conv, torch.randn((sequences, heads, dim, dim), device=device) * 0.1)


def _compared(run: Callable[..., Any], reference: Callable[..., Any], states: StateCache) -> Any:
    """Compare from the same states: a call changes them."""

    def copied() -> StateCache:
        return StateCache(states.conv.clone(), states.recurrent.clone())

    return lambda: (run(copied()), reference(copied()))


def delta(
    device: torch.device, sequences: int, tokens: int, keys: int, heads: int, dim: int, width: int
) -> Problem:
    """Measure the delta rule: bytes of the states in a decode step, operations of a chunk in a prompt."""
    meta, states = _batch(device, sequences, tokens), _states(device, sequences, keys, heads, dim, width)
    dtype, rows = dtype_on(device), sequences * tokens
    qkv = torch.randn((rows, (2 * keys + heads) * dim), device=device, dtype=dtype)
    strength, decay = (torch.randn((rows, heads), device=device, dtype=dtype) for _ in range(2))
    gates = DeltaGates(strength, decay, torch.zeros(heads, device=device), torch.zeros(heads, device=device))
    check = _compared(
        lambda cache: delta_rule(qkv, gates, cache, meta),
        lambda cache: delta_rule_reference(qkv, gates, cache, meta),
        states,
    )
    run = partial(delta_rule, qkv, gates, states, meta)
    if tokens == 1:
        return Problem(run, check, 2 * states.recurrent.nbytes + qkv.nbytes)
    # Per token and head: reading and writing the state, and the products within a chunk of 64.
    return Problem(run, check, rows * heads * (4 * dim * dim + 4 * 64 * dim), compute=True)


def convolution(
    device: torch.device, sequences: int, tokens: int, keys: int, heads: int, dim: int, width: int
) -> Problem:
    """Measure the short causal convolution with its SiLU."""
    meta, states = _batch(device, sequences, tokens), _states(device, sequences, keys, heads, dim, width)
    x = torch.randn((sequences * tokens, states.conv.shape[2]), device=device, dtype=states.conv.dtype)
    weight = torch.randn((states.conv.shape[2], width), device=device, dtype=x.dtype)
    check = _compared(
        lambda cache: causal_conv(x, weight, cache, meta),
        lambda cache: conv_reference(x, weight, None, cache, meta, gated=False),
        states,
    )
    moved = 2 * x.nbytes + 2 * states.conv.nbytes + weight.nbytes
    return Problem(partial(causal_conv, x, weight, states, meta), check, moved)


def norm(device: torch.device, rows: int, keys: int, heads: int, dim: int, width: int) -> Problem:
    """Measure the norm of each head with the output gate."""
    x = torch.randn((rows, heads, dim), device=device, dtype=dtype_on(device))
    gate, weight = torch.randn_like(x).flatten(1), torch.rand_like(x[0, 0]) + 0.5
    run = partial(gated_norm, x, gate, weight, 1e-6)
    check = partial(gated_norm_reference, x, gate, weight, 1e-6)
    return Problem(run, lambda: (run(), check()), 3 * x.nbytes)
