"""The gated delta rule in torch, and token after token in Triton.

A sequence has a state ``S (K, V)`` for each value head. With decay ``d = exp(g)`` and strength ``b``, token
after token, ``S`` becomes ``d S + k b (v - k d S)`` and the output is ``q S``
(https://arxiv.org/abs/2412.06464, equation 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.recurrent_state import StateCache, first_tokens

#: Tokens whose updates of the state are combined into a few GEMMs.
CHUNK = 64
#: Added to the sum of squares of a query or key.
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaGates:
    """The gates of ``T`` tokens before their activations.

    Attributes:
        strength: ``(T, heads)``; ``b`` is its sigmoid.
        decay: ``(T, heads)``; ``g`` is ``-exp(log_rate) * softplus(decay + shift)``, in float32.
        log_rate, shift: ``(heads,)`` float32 contiguous, weights.
    """

    strength: torch.Tensor
    decay: torch.Tensor
    log_rate: torch.Tensor
    shift: torch.Tensor


def delta_rule_reference(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.delta_rule`. Short pieces of prompts are taken token by token."""
    assert meta.state_rows is not None
    q, k, v = _heads(qkv, cache)
    strength = gates.strength.sigmoid().float()
    decay = -gates.log_rate.exp() * F.softplus(gates.decay.float() + gates.shift)
    out = torch.empty(v.shape, dtype=qkv.dtype, device=qkv.device)
    states = cache.recurrent[meta.state_rows].masked_fill(first_tokens(meta)[:, None, None, None], 0)
    if meta.max_query_len == 1:
        result, states = _one_token(q, k, v, strength, decay, states)
        out.copy_(result)
        cache.recurrent[meta.state_rows] = states
        return out
    bounds, rows = meta.query_start.tolist(), meta.state_rows.tolist()
    for index, row in enumerate(rows):
        state = states[index]
        for start in range(bounds[index], bounds[index + 1], CHUNK):
            piece = slice(start, min(start + CHUNK, bounds[index + 1]))
            parts = (x[piece].transpose(0, 1) for x in (q, k, v, strength, decay))
            result, state = _chunk(*parts, state)
            out[piece] = result.transpose(0, 1)
        if bounds[index + 1] > bounds[index]:
            cache.recurrent[row] = state
    return out


def _heads(qkv: torch.Tensor, cache: StateCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries and keys ``(T, heads, K)``, of length 1 and scaled, and values ``(T, heads, V)``, in
    float32; each key head is repeated for its value heads."""
    _, heads, key_dim, value_dim = cache.recurrent.shape
    values = heads * value_dim
    keys = (qkv.shape[1] - values) // 2
    q, k, v = (part.float().unflatten(1, (-1, dim)) for part, dim in zip(
        qkv.split([keys, keys, values], dim=1), (key_dim, key_dim, value_dim), strict=True
    ))  # fmt: skip
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    repeats = heads // q.shape[1]
    return q.repeat_interleave(repeats, 1) * key_dim**-0.5, k.repeat_interleave(repeats, 1), v


def _one_token(q, k, v, strength, decay, states) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule for one token of each of ``S`` sequences, with states ``(S, heads, K, V)``."""
    states = states * decay.exp()[..., None, None]
    change = (v - (k[..., None, :] @ states).squeeze(-2)) * strength[..., None]
    states = states + k[..., None] * change[..., None, :]
    return (q[..., None, :] @ states).squeeze(-2), states


def _chunk(q, k, v, strength, decay, state) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule for ``C`` consecutive tokens of one sequence.

    Token ``i`` writes ``k_i u_i``, where ``u`` solves ``(I + A) u = b (v - exp(G) k S)`` with ``G`` the sum of
    ``g`` up to each token and ``A_ij = b_i (k_i k_j) exp(G_i - G_j)`` below the diagonal.

    Args:
        q, k, v: ``(heads, C, K or V)``.
        strength, decay: ``(heads, C)``.
        state: ``(heads, K, V)``, before the tokens.

    Returns:
        The outputs ``(heads, C, V)`` and the state after the tokens.
    """
    total = decay.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = (k @ k.transpose(-1, -2)) * between * strength[..., None]
    known = (v - (k * total.exp()[..., None]) @ state) * strength[..., None]
    # The diagonal is taken to be 1.
    written = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    out = (q * total.exp()[..., None]) @ state + ((q @ k.transpose(-1, -2)) * between) @ written
    last = total[..., -1:]
    decayed = k * (last - total).exp()[..., None]
    return out, state * last.exp()[..., None] + decayed.transpose(-1, -2) @ written


def delta_step_triton(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """The rule for one new token of each sequence; see :func:`engine.kernels.dispatch.delta_rule`."""
    _, heads, _, value_dim = cache.recurrent.shape
    out = torch.empty((len(qkv), heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    step_tokens(qkv, gates, cache, meta, out, most=0)
    return out


def step_tokens(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata, out: torch.Tensor,
    *, most: int,
) -> None:  # fmt: skip
    """Apply the rule token after token, to the sequences of up to ``most`` new tokens; 0: all have one."""
    (_, heads, key_dim, value_dim), sequences = cache.recurrent.shape, meta.seq_lens.shape[0]
    assert meta.state_rows is not None and qkv.stride(-1) == 1
    # A state of 128 by 128 in two halves: more programs than SMs even for one sequence.
    block = min(64, triton.next_power_of_2(value_dim))
    if len(qkv) and sequences:
        launch(
            _delta_step_kernel, (triton.cdiv(value_dim, block), heads, sequences),
            qkv_ptr=qkv, strength_ptr=gates.strength, decay_ptr=gates.decay,
            log_rate_ptr=gates.log_rate, shift_ptr=gates.shift,
            state_ptr=cache.recurrent, rows_ptr=meta.state_rows,
            query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, out_ptr=out,
            qkv_stride=qkv.stride(0), strength_stride=gates.strength.stride(0),
            decay_stride=gates.decay.stride(0),
            HEADS=heads, KEY_HEADS=(qkv.shape[1] - heads * value_dim) // (2 * key_dim),
            KEY_DIM=key_dim, VALUE_DIM=value_dim, KEYS=triton.next_power_of_2(key_dim), VALUES=block,
            MOST=most, EPS=NORM_EPS, num_warps=4, **pdl_options(qkv),
        )  # fmt: skip


@triton.jit
def log_decay(raw, log_rate, shift):
    """Compute ``-exp(log_rate) * softplus(raw + shift)``; all float32."""
    x = raw + shift
    # As torch: the identity from 20 on. A series where 1 + exp(x) would round the sum away.
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * 0.33333333))
    softplus = tl.where(x > 20.0, x, tl.where(e < 0.01, small, tl.log(1.0 + e)))
    return -tl.exp(log_rate) * softplus


@triton.jit
def _delta_step_kernel(
    qkv_ptr, strength_ptr, decay_ptr, log_rate_ptr, shift_ptr, state_ptr, rows_ptr, query_start_ptr,
    seq_lens_ptr, out_ptr, qkv_stride, strength_stride, decay_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, MOST: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of its values."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, count = sequence, 1
    if MOST > 0:
        begin = tl.load(query_start_ptr + sequence).to(tl.int64)
        count = (tl.load(query_start_ptr + sequence + 1) - begin).to(tl.int32)
        if (count <= 0) | (count > MOST):
            wait_for_previous(PDL)
            return
    key, value = tl.arange(0, KEYS), tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    in_key, in_value = key < KEY_DIM, value < VALUE_DIM
    inside = in_key[:, None] & in_value[None, :]
    rate, shift = tl.load(log_rate_ptr + head), tl.load(shift_ptr + head)
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    state = state_ptr + (row * HEADS + head) * KEY_DIM * VALUE_DIM + key[:, None] * VALUE_DIM + value[None, :]
    # The previous kernel doesn't write the state: its load is issued before the wait.
    s = tl.load(state, mask=inside, other=0.0)
    s = tl.where(tl.load(seq_lens_ptr + sequence) > count, s, 0.0)
    wait_for_previous(PDL)
    key_head = head // (HEADS // KEY_HEADS)
    for token in range(begin, begin + count):
        source = qkv_ptr + token * qkv_stride
        q = tl.load(source + key_head * KEY_DIM + key, mask=in_key, other=0.0).to(tl.float32)
        k = tl.load(source + (KEY_HEADS + key_head) * KEY_DIM + key, mask=in_key, other=0.0).to(tl.float32)
        v = tl.load(
            source + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + value, mask=in_value, other=0.0
        ).to(tl.float32)  # fmt: skip
        q = q / tl.sqrt(tl.sum(q * q, axis=0) + EPS) * KEY_DIM**-0.5
        k = k / tl.sqrt(tl.sum(k * k, axis=0) + EPS)
        raw = tl.load(strength_ptr + token * strength_stride + head)
        strength = (1.0 / (1.0 + tl.exp(-raw.to(tl.float32)))).to(raw.dtype).to(tl.float32)
        decay = tl.load(decay_ptr + token * decay_stride + head).to(tl.float32)
        s = s * tl.exp(log_decay(decay, rate, shift))
        change = (v - tl.sum(s * k[:, None], axis=0)) * strength
        s += k[:, None] * change[None, :]
        out = out_ptr + (token * HEADS + head) * VALUE_DIM + value
        tl.store(out, tl.sum(s * q[:, None], axis=0).to(out_ptr.dtype.element_ty), mask=in_value)
    tl.store(state, s, mask=inside)
