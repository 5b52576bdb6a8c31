"""Kernels of the gated delta net and of LFM2's convolution against references, references against theirs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from engine.kernels import delta_prefill, delta_scan
from engine.kernels.causal_conv import causal_conv, conv_reference, conv_triton
from engine.kernels.delta_prefill import delta_prefill_triton
from engine.kernels.delta_rule import DeltaGates, delta_rule_reference, delta_step_triton
from engine.kernels.device import is_hopper
from engine.kernels.gated_norm import gated_norm_reference, gated_norm_triton
from engine.kernels.paged import AttentionMetadata
from engine.kernels.recurrent_state import StateCache

from .compare import assert_close

KEY_HEADS, HEADS, KEYS, VALUES, WIDTH = 2, 4, 16, 24, 4
CHANNELS = 2 * KEY_HEADS * KEYS + HEADS * VALUES
#: New tokens of each sequence, and tokens before them.
BATCHES = {
    "decode": ([1, 1, 1], [5, 0, 70]),
    "one prompt": ([150], [0]),
    "several segments": ([290, 80, 200], [3, 0, 0]),
    "a chunk that goes on": ([64], [3]),
    "mixed": ([1, 1, 70, 0, 3, 17], [9, 1, 0, 4, 2, 30]),
    "sequences that share places of tiles": ([33, 34, 32, 65, 40], [0, 2, 1, 0, 3]),
}


def metadata(new: list[int], before: list[int], device: torch.device) -> AttentionMetadata:
    """Sequences whose states are in the rows of a pool from the last but one down; the first is unused."""
    lengths = [a + b for a, b in zip(new, before, strict=True)]
    count = len(new)
    return AttentionMetadata(
        block_tables=torch.zeros(count, 1, dtype=torch.int32, device=device),
        query_start=torch.tensor([0, *new], device=device).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64, device=device),
        max_query_len=max(new),
        max_seq_len=max(lengths),
        state_rows=torch.arange(count, 0, -1, device=device),
    )


def states(meta: AttentionMetadata, dtype: torch.dtype) -> StateCache:
    """States of ``meta``'s sequences; those without tokens before hold what must not be read."""
    rows, device = len(meta.seq_lens) + 2, meta.seq_lens.device
    conv = torch.randn(rows, WIDTH - 1, CHANNELS, device=device).to(dtype)
    recurrent = torch.randn(rows, HEADS, KEYS, VALUES, device=device)
    for row, begins in zip(meta.state_rows.tolist(), starts(meta), strict=True):
        if begins:
            conv[row], recurrent[row] = torch.nan, torch.nan
    return StateCache(conv, recurrent)


def starts(meta: AttentionMetadata) -> list[bool]:
    """Mark the sequences that begin with their new tokens."""
    return (meta.seq_lens == meta.query_start.diff()).tolist()


def copy_of(cache: StateCache) -> StateCache:
    return StateCache(cache.conv.clone(), cache.recurrent.clone())


def gates(tokens: int, dtype: torch.dtype, device: torch.device) -> DeltaGates:
    both = torch.randn(tokens, 2 * HEADS, device=device).to(dtype)
    log_rate, shift = torch.randn(2, HEADS, device=device)
    return DeltaGates(both[:, :HEADS], both[:, HEADS:], log_rate - 2, shift)


def check_states(
    ours: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, meta, tolerance: float = 0.0
) -> None:
    """States of sequences with new tokens are as expected; all others are as before."""
    moved = meta.state_rows[meta.query_start.diff() > 0]
    assert_close(ours[moved], expected[moved], tolerance=tolerance)
    kept = torch.ones(len(ours), dtype=torch.bool, device=ours.device)
    kept[moved] = False
    assert torch.equal(ours[kept].nan_to_num(7), before[kept].nan_to_num(7))


@pytest.mark.parametrize(("gated", "biased"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_short_convolution(device, dtype, batch, gated, biased):
    meta = metadata(*BATCHES[batch], device)
    inputs = 3 * CHANNELS if gated else CHANNELS
    x = torch.randn(len(meta.slot_mapping), inputs + 5, device=device).to(dtype)[:, :inputs]
    weight = torch.randn(CHANNELS, WIDTH, device=device).to(dtype)
    bias = torch.randn(CHANNELS, device=device).to(dtype) if biased else None
    before = states(meta, dtype)
    ours, expected = copy_of(before), copy_of(before)
    assert_close(
        conv_triton(x, weight, bias, ours, meta, gated=gated),
        conv_reference(x, weight, bias, expected, meta, gated=gated),
    )
    check_states(ours.conv, expected.conv, before.conv, meta)


@pytest.mark.parametrize(
    ("batch", "segment"), [*((batch, 1024) for batch in BATCHES), ("several segments", 64), ("mixed", 64)]
)
def test_delta_rule(monkeypatch, device, dtype, batch, segment):
    monkeypatch.setattr(delta_prefill, "_SEGMENT", segment)
    meta = metadata(*BATCHES[batch], device)
    tokens = len(meta.slot_mapping)
    qkv = torch.randn(tokens, CHANNELS + 3, device=device).to(dtype)[:, :CHANNELS]
    given, before = gates(tokens, dtype, device), states(meta, dtype)
    run = delta_step_triton if meta.max_query_len == 1 else delta_prefill_triton
    ours, expected = copy_of(before), copy_of(before)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert_close(
        run(qkv, given, ours, meta), delta_rule_reference(qkv, given, expected, meta), tolerance=tolerance
    )
    check_states(ours.recurrent, expected.recurrent, before.recurrent, meta, tolerance)


def test_delta_rule_of_equal_tokens_that_are_never_forgotten(device, dtype):
    """The system of equations of a tile is as badly conditioned as it can be."""
    meta = metadata([130], [0], device)
    qkv = torch.randn(1, CHANNELS, device=device).to(dtype).expand(130, -1).contiguous()
    ones = torch.full((130, HEADS), 9.0, device=device).to(dtype)
    rates = torch.full((HEADS,), -20.0, device=device)
    given = DeltaGates(ones, ones, rates, rates)
    ours, expected = states(meta, dtype), states(meta, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    result = delta_prefill_triton(qkv, given, ours, meta)
    assert_close(result, delta_rule_reference(qkv, given, expected, meta), tolerance=tolerance)


def test_prompts_on_hopper(monkeypatch, device):
    """The scan in Gluon, with a prompt of several segments that goes on, and one that begins."""
    if not is_hopper(device):
        pytest.skip("the scan is for Hopper GPUs, and Gluon has no interpreter")
    monkeypatch.setattr(delta_prefill, "_SEGMENT", 256)
    heads, dim, dtype = 2, 128, torch.bfloat16
    meta = metadata([900, 1, 200], [70, 3, 0], device)
    qkv = torch.randn(1101, 4 * dim, device=device).to(dtype)
    both = torch.randn(1101, 2 * heads, device=device).to(dtype)
    given = DeltaGates(both[:, :heads], both[:, heads:], *torch.randn(2, heads, device=device) - 2)
    ours = StateCache(
        torch.zeros(5, 3, 4 * dim, device=device), torch.randn(5, heads, dim, dim, device=device)
    )
    assert delta_scan.supports(ours, dtype)
    before, expected = ours.recurrent.clone(), copy_of(ours)
    result = delta_prefill_triton(qkv, given, ours, meta)
    assert_close(result, delta_rule_reference(qkv, given, expected, meta), tolerance=0.02)
    check_states(ours.recurrent, expected.recurrent, before, meta, 0.02)


def test_prompt_chunks_and_single_tokens_are_the_same_rule(device):
    """Whole, in pieces that end anywhere, and token by token."""
    length, dtype = 75, torch.float32
    qkv, given = torch.randn(length, CHANNELS, device=device), gates(length, dtype, device)
    whole = metadata([length], [0], device)
    cache = states(whole, dtype)
    expected = delta_rule_reference(qkv, given, cache, whole)
    for cuts in ([0, 1, 40, 64, 75], list(range(76))):
        pieces = states(whole, dtype)
        for start, end in pairwise(cuts):
            part = replace(given, strength=given.strength[start:end], decay=given.decay[start:end])
            out = delta_rule_reference(qkv[start:end], part, pieces, metadata([end - start], [start], device))
            assert_close(out, expected[start:end], tolerance=1e-5)
        assert_close(pieces.recurrent[1], cache.recurrent[1], tolerance=1e-5)


@pytest.mark.parametrize("length", [1, 30, 130])
def test_references_equal_transformers(length):
    meta = metadata([length], [0], torch.device("cpu"))
    cache, given = states(meta, torch.float32), gates(length, torch.float32, torch.device("cpu"))
    x, weight = torch.randn(length, CHANNELS), torch.randn(CHANNELS, WIDTH)
    qkv = causal_conv(x, weight, cache, meta)
    expected = theirs.causal_conv1d_fn(x.T[None], weight, activation="silu")[0].T
    assert_close(qkv, expected)
    q, k, v = qkv.split([KEY_HEADS * KEYS, KEY_HEADS * KEYS, HEADS * VALUES], dim=1)
    decay = -given.log_rate.exp() * torch.nn.functional.softplus(given.decay + given.shift)
    # Older releases take queries and keys that are repeated already.
    q, k = (part.unflatten(1, (KEY_HEADS, KEYS)).repeat_interleave(2, 1)[None] for part in (q, k))
    output, state = theirs.torch_chunk_gated_delta_rule(
        q,
        k,
        v.unflatten(1, (HEADS, VALUES))[None],
        g=decay[None],
        beta=given.strength.sigmoid()[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_close(delta_rule_reference(qkv, given, cache, meta), output[0], tolerance=1e-5)
    assert_close(cache.recurrent[1], state[0], tolerance=1e-5)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 4, 24), (5, 2, 64), (67, 3, 24)])
def test_gated_norm(device, dtype, tokens, heads, dim):
    x = torch.randn(tokens, heads, dim, device=device, dtype=dtype)
    gate = torch.randn(tokens, heads * dim + 8, device=device, dtype=dtype)[:, : heads * dim]
    weight = torch.randn(dim, device=device, dtype=dtype)
    assert_close(gated_norm_triton(x, gate, weight, 1e-6), gated_norm_reference(x, gate, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norm_rounds_as_transformers_does(dtype):
    norm = theirs.Qwen3_5RMSNormGated(24, eps=1e-6).to(dtype)
    norm.weight.data.normal_()
    x, gate = torch.randn(5, 4, 24).to(dtype), torch.randn(5, 96).to(dtype)
    expected = norm(x.view(20, 24), gate.view(20, 24)).view(5, 96)
    assert torch.equal(gated_norm_reference(x, gate, norm.weight.data, 1e-6), expected)
