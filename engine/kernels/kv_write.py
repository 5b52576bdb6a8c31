"""Scatters new keys and values into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value to its slot.

    Args:
        k, v: ``(T, Hkv, D)``; may be strided views whose last dimension is contiguous.
        k_cache, v_cache: ``(N, Hkv, block_size, D)``, changed in place.
        slot_mapping: ``(T,)`` int64, ``block * block_size + offset``; negative entries write nothing.
    """
    run = kv_write_triton if use_triton(k) else kv_write_reference
    run(k, v, k_cache, v_cache, slot_mapping)


def kv_write_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    block_size = k_cache.shape[2]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    k_cache[slots // block_size, :, slots % block_size] = k[kept]
    v_cache[slots // block_size, :, slots % block_size] = v[kept]


def kv_write_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    tokens, heads, dim = k.shape
    assert k.stride(-1) == 1 and v.stride(-1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    if tokens == 0:
        return
    _kv_write_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEADS=heads,
        DIM=dim,
        BLOCK_SIZE=k_cache.shape[2],
        HEADS_PAD=triton.next_power_of_2(heads),
        DIM_PAD=triton.next_power_of_2(dim),
        num_warps=4,
    )


@triton.jit
def _kv_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PAD)[:, None]
        dim = tl.arange(0, DIM_PAD)[None, :]
        mask = (head < HEADS) & (dim < DIM)
        target = ((slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + dim
        k = tl.load(k_ptr + token * k_token + head * k_head + dim, mask=mask)
        v = tl.load(v_ptr + token * v_token + head * v_head + dim, mask=mask)
        tl.store(k_cache_ptr + target, k, mask=mask)
        tl.store(v_cache_ptr + target, v, mask=mask)
