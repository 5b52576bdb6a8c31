"""Gumbel-max sampling: ``argmax(logit / temperature + noise)`` in one pass over the vocabulary.

The noise is a pure function of (seed, index of the output token, token id), so a request gets the same tokens
in every batch, row and chunking, and after every preemption. The noise is ``-log(E)`` with ``E = -log(1 -
v)`` and ``v`` uniform in (0, 1): the token with the least ``E / p`` wins the exponential race, with
probability ``p``.

``v`` has 32 bits of a keyed integer hash (two rounds of MurmurHash3's finaliser with two keys), which torch
and Triton compute alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import use_triton
from engine.kernels.launch import launch

_M32 = 0xFFFFFFFF


def gumbel_argmax(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    index: Tensor,
    threshold: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Sample one token per row; the lowest id wins ties.

    Args:
        logits: ``(N, V)`` of any float dtype, last dimension contiguous.
        temperature: ``(N,)`` float32; 0 takes the exact argmax and ignores the threshold.
        seeds: ``(N,)`` int64.
        index: ``(N,)`` int64, index of the token in its output.
        threshold: ``(N,)`` float32; tokens with a smaller logit are never sampled. None: all may be sampled.
        allowed: ``(N, ceil(V / 32))`` int32; a token whose bit, ``id % 32`` of word ``id // 32``, is 0 is
            never sampled. None: all may be sampled.

    Returns:
        ``(N,)`` int64; -1 for a row whose logits are all ``-inf``, or of which no token is allowed.
    """
    if use_triton(logits):
        return gumbel_argmax_triton(logits, temperature, seeds, index, threshold, allowed)
    return gumbel_argmax_reference(logits, temperature, seeds, index, threshold, allowed)


def argmax(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the most likely of the ``allowed`` tokens of each row of logits ``(N, V)``, ``(N,)`` int64; see
    :func:`gumbel_argmax`."""
    if use_triton(logits):
        return argmax_triton(logits, allowed)
    return _argmax_reference(_masked(logits, allowed))


def mask_tokens(logits: Tensor, allowed: Tensor) -> Tensor:
    """Set logits ``(N, V)``, in place, to ``-inf`` where the bit of a token is 0; ``allowed`` as for
    :func:`gumbel_argmax`."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    banned = ((allowed[:, :, None] >> bits) & 1) == 0
    return logits.masked_fill_(banned.flatten(1)[:, : logits.shape[1]], float("-inf"))


def _masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    return logits if allowed is None else mask_tokens(logits.clone(), allowed)


def gumbel_argmax_reference(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    index: Tensor,
    threshold: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    x = _masked(logits.float(), allowed)
    greedy = (temperature == 0)[:, None]
    ids = torch.arange(x.shape[1], device=x.device)
    score = x / torch.where(greedy, 1.0, temperature[:, None]) - exponential_noise(seeds, index, ids).log()
    if threshold is not None:
        score = torch.where(x >= threshold[:, None], score, float("-inf"))
    return _argmax_reference(torch.where(greedy, x, score))


def _argmax_reference(x: Tensor) -> Tensor:
    best = x.argmax(dim=1)
    return torch.where(x.gather(1, best[:, None])[:, 0] == float("-inf"), -1, best)


def exponential_noise(seeds: Tensor, index: Tensor, ids: Tensor) -> Tensor:
    """Return standard exponential variates ``(N, len(ids))`` float32 for int64 seeds ``(N,)``, index ``(N,)``
    and token ids."""
    key0, key1 = _row_keys(seeds, index)
    bits = _mix((ids[None, :] * 0x9E3779B1 + key0[:, None]) & _M32)
    bits = _mix(bits ^ key1[:, None])
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    # Near 0, where races are won, 1 - v has lost the digits of v; a series replaces the logarithm.
    return torch.where(v < 1e-3, v * (1.0 + v * (0.5 + v * (1.0 / 3.0))), -torch.log(1.0 - v))


def _row_keys(seeds: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Derive two hash keys per row, int64 ``(N,)`` holding uint32 values."""
    low, high, index = seeds & _M32, (seeds >> 32) & _M32, index & _M32
    key0 = _mix(_mix(_mix(low ^ 0x9E3779B9) ^ high) ^ index)
    key1 = _mix((_mix((_mix(high ^ 0x7F4A7C15) + low) & _M32) + index * 0x85157AF5) & _M32)
    return key0, key1


def _mix(x: Tensor) -> Tensor:
    """Apply MurmurHash3's 32-bit finaliser to int64 tensors that hold uint32 values.

    Multiplications may wrap; the low 32 bits stay exact.
    """
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _M32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _M32
    return x ^ (x >> 16)


@triton.jit
def _mix_u32(x):
    """Apply MurmurHash3's 32-bit finaliser to uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["chunk", "num_chunks"])
def _partial_argmax_kernel(
    logits, temperature, seeds, index, threshold, allowed, best, best_id,
    stride_logits, stride_temperature, stride_seeds, stride_index, stride_threshold, stride_allowed,
    vocab, chunk, num_chunks,
    GREEDY: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_ALLOWED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and chunk of the vocabulary: the chunk's best score and its token id."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    floor = float("-inf")
    if not GREEDY:
        temp = tl.load(temperature + row * stride_temperature)
        is_random = temp != 0.0
        scale = tl.where(is_random, temp, 1.0)
        seed = tl.load(seeds + row * stride_seeds)
        step = tl.load(index + row * stride_index).to(tl.uint32)
        low = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
        key0 = _mix_u32(_mix_u32(_mix_u32(low ^ 0x9E3779B9) ^ high) ^ step)
        key1 = _mix_u32(_mix_u32(_mix_u32(high ^ 0x7F4A7C15) + low) + step * 0x85157AF5)
    if HAS_THRESHOLD:
        floor = tl.where(is_random, tl.load(threshold + row * stride_threshold), float("-inf"))

    # Each lane keeps its own best score; ids ascend, so a strict comparison keeps the lowest id.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    top_id = tl.full([BLOCK], 2147483647, tl.int32)
    start = part * chunk
    for offset in range(0, chunk, BLOCK):
        ids = start + offset + tl.arange(0, BLOCK)
        inside = (ids < vocab) & (offset + tl.arange(0, BLOCK) < chunk)
        if HAS_ALLOWED:
            words = tl.load(allowed + row * stride_allowed + ids // 32, mask=inside, other=0)
            inside = inside & (((words >> (ids % 32)) & 1) != 0)
        x = tl.load(logits + row * stride_logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
        score = x
        if not GREEDY:
            if is_random:
                bits = _mix_u32(ids.to(tl.uint32) * 0x9E3779B1 + key0)
                bits = _mix_u32(bits ^ key1)
                v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
                exponential = tl.where(
                    v < 1e-3, v * (1.0 + v * (0.5 + v * 0.3333333333333333)), -tl.log(1.0 - v)
                )
                score = x / scale - tl.log(exponential)
        score = tl.where(inside & (x >= floor), score, float("-inf"))
        better = score > top
        top = tl.where(better, score, top)
        top_id = tl.where(better, ids, top_id)
    value = tl.max(top, axis=0)
    tl.store(best + row * num_chunks + part, value)
    tl.store(best_id + row * num_chunks + part, tl.min(tl.where(top == value, top_id, 2147483647), axis=0))


@triton.jit(do_not_specialize=["num_chunks"])
def _final_argmax_kernel(best, best_id, out, num_chunks, BLOCK: tl.constexpr):
    """One program per row: the best of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    inside = parts < num_chunks
    value = tl.load(best + row * num_chunks + parts, mask=inside, other=float("-inf"))
    ids = tl.load(best_id + row * num_chunks + parts, mask=inside, other=2147483647)
    winner = tl.min(tl.where(value == tl.max(value, axis=0), ids, 2147483647), axis=0)
    # If all logits are -inf, no chunk has kept an id.
    tl.store(out + row, tl.where(winner == 2147483647, -1, winner).to(tl.int64))


def argmax_triton(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    return gumbel_argmax_triton(logits, allowed=allowed)


def gumbel_argmax_triton(
    logits: Tensor,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    threshold: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Do what :func:`gumbel_argmax` does; without a temperature all rows take the exact argmax."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    block = 1024
    # With few rows, enough programs to fill the GPU; with many rows, long chunks.
    num_chunks = max(1, min(triton.cdiv(vocab, block), triton.cdiv(1024, max(rows, 1))))
    chunk = triton.cdiv(triton.cdiv(vocab, num_chunks), block) * block
    num_chunks = triton.cdiv(vocab, chunk)
    best = torch.empty((rows, num_chunks), dtype=torch.float32, device=logits.device)
    best_id = torch.empty((rows, num_chunks), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    launch(
        _partial_argmax_kernel, (rows, num_chunks),
        logits=logits, temperature=temperature, seeds=seeds, index=index, threshold=threshold,
        allowed=allowed, best=best, best_id=best_id,
        stride_logits=logits.stride(0), stride_temperature=_stride(temperature), stride_seeds=_stride(seeds),
        stride_index=_stride(index), stride_threshold=_stride(threshold),
        stride_allowed=_stride(allowed), vocab=vocab, chunk=chunk, num_chunks=num_chunks,
        GREEDY=temperature is None, HAS_THRESHOLD=threshold is not None,
        HAS_ALLOWED=allowed is not None, BLOCK=block,
    )  # fmt: skip
    # The block fits the chunks of a single row, which has the most: one compiled kernel serves all batch
    # sizes.
    most = triton.next_power_of_2(triton.cdiv(vocab, block))
    launch(
        _final_argmax_kernel, (rows,), best=best, best_id=best_id, out=out, num_chunks=num_chunks, BLOCK=most
    )  # fmt: skip
    return out


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
