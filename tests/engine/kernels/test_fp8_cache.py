"""Kernels with keys and values in fp8 equal the reference with the numbers that these stand for.

Triton's interpreter rounds wrongly to fp8, so what kernels write there is exact in fp8: nothing is rotated.
"""

from __future__ import annotations

import pytest
import torch

from engine.kernels.decode_attention import decode_attention_reference, decode_attention_triton
from engine.kernels.fp8 import FP8
from engine.kernels.kv_write import rotary_kv_write_reference, rotary_kv_write_triton
from engine.kernels.paged import KVCache
from engine.kernels.paged_attention import paged_attention_reference, paged_attention_triton
from engine.kernels.rotary import RotaryTable, rotary_reference

from .compare import assert_close
from .paged_problem import PagedProblem

KEY_SCALE, VALUE_SCALE = 0.25, 2.0
#: Query heads, KV heads, numbers of a head.
HEADS = [(4, 2, 16), (3, 1, 24), (6, 6, 64)]


def in_fp8(cache: KVCache) -> KVCache:
    keys, values = (cache.keys / KEY_SCALE).to(FP8), (cache.values / VALUE_SCALE).to(FP8)
    return KVCache(keys, values, KEY_SCALE, VALUE_SCALE)


def plain(cache: KVCache) -> KVCache:
    return KVCache(cache.keys.float() * cache.key_scale, cache.values.float() * cache.value_scale)


def exact(shape, scale, device, dtype) -> torch.Tensor:
    """Random numbers that are exact in fp8 after division by ``scale``."""
    return (torch.randn(shape).to(FP8).float() * scale).to(device, dtype)


def unrotated(dim: int, device) -> RotaryTable:
    return RotaryTable(torch.ones(64, dim // 2, device=device), torch.zeros(64, dim // 2, device=device))


@pytest.mark.parametrize("run", [paged_attention_reference, paged_attention_triton])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_of_chunks(device, dtype, heads, kv_heads, dim, window, run):
    lengths, queries = [37, 5, 70], [20, 1, 3]
    sizes = {"kv_heads": kv_heads, "dim": dim, "block_size": 8}
    problem = PagedProblem(device, torch.float32, lengths=lengths, queries=queries, written=lengths, **sizes)
    cache, q = in_fp8(problem.cache), torch.randn(sum(queries), heads, dim).to(device, dtype)
    result = run(q, cache, problem.meta, scale=0.3, window=window)
    expected = paged_attention_reference(q.float(), plain(cache), problem.meta, scale=0.3, window=window)
    assert_close(result, expected, tolerance=5e-6)


@pytest.mark.parametrize("run", [decode_attention_reference, decode_attention_triton])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_of_a_decode_step(device, dtype, heads, kv_heads, dim, window, run):
    lengths = [37, 1, 170]
    sizes = {"kv_heads": kv_heads, "dim": dim, "block_size": 8}
    written = [length - 1 for length in lengths]
    problem = PagedProblem(device, torch.float32, lengths=lengths, queries=[1] * 3, written=written, **sizes)
    cache, q = in_fp8(problem.cache), torch.randn(3, heads, dim).to(device, dtype)
    k = exact((3, kv_heads, dim), KEY_SCALE, device, dtype)
    v = exact((3, kv_heads, dim), VALUE_SCALE, device, dtype)
    positions, table = torch.zeros(3, dtype=torch.int64, device=device), unrotated(dim, device)
    wide = plain(cache)
    arguments = (positions, table)
    expected = decode_attention_reference(
        q.float(), k.float(), v.float(), *arguments, wide, problem.meta, scale=0.3, window=window
    )
    result = run(q.clone(), k.clone(), v, *arguments, cache, problem.meta, scale=0.3, window=window)
    assert_close(result, expected, tolerance=5e-6)
    torch.testing.assert_close(plain(cache).keys, wide.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(plain(cache).values, wide.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("run", [rotary_kv_write_reference, rotary_kv_write_triton])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_writing(device, dtype, heads, kv_heads, dim, run):
    """Numbers beyond fp8's largest become that; a part of each head is rotated."""
    empty = torch.full((5, kv_heads, 4, dim), torch.nan, device=device).to(FP8)
    cache = KVCache(empty, empty.clone(), KEY_SCALE, VALUE_SCALE)
    q = torch.randn(7, heads, dim).to(device, dtype)
    k = exact((7, kv_heads, dim), KEY_SCALE, device, dtype)
    v = exact((7, kv_heads, dim), VALUE_SCALE, device, dtype)
    k[3, 0, 1], k[3, 0, 5], v[2, 0, 0] = 1e4, -1e4, 1e5
    slots = torch.tensor([3, 19, -1, 4, 12, 0, 7], device=device)
    table = unrotated(dim // 2, device)
    positions = torch.zeros(7, dtype=torch.int64, device=device)
    run(q, k.clone(), v, positions, table, cache, slots)
    for name, rows, scale in (("keys", k, KEY_SCALE), ("values", v, VALUE_SCALE)):
        found = getattr(cache, name).float().transpose(1, 2).flatten(0, 1)
        kept = slots >= 0
        expected = (rows[kept].float() / scale).clamp(-448, 448)
        assert torch.equal(found[slots[kept]], expected)
        untouched = torch.ones(20, dtype=torch.bool, device=device)
        untouched[slots[kept]] = False
        assert found[untouched].isnan().all()


def test_rotated_keys_are_rounded(device):
    """The reference rotates first, then divides by the scale and rounds."""
    angles = torch.rand(64, 8) * 6
    table = RotaryTable(angles.cos(), angles.sin())
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    positions, slots = torch.arange(5), torch.arange(5)
    wide = KVCache(*torch.zeros(2, 2, 2, 4, 16))
    rotary_kv_write_reference(q.clone(), k.clone(), v, positions, table, wide, slots)
    cache = KVCache(*torch.zeros(2, 2, 2, 4, 16).to(FP8), KEY_SCALE, VALUE_SCALE)
    rotary_kv_write_reference(q.clone(), k.clone(), v, positions, table, cache, slots)
    assert torch.equal(cache.keys.float(), (wide.keys / KEY_SCALE).to(FP8).float())
    assert torch.equal(cache.values.float(), (wide.values / VALUE_SCALE).to(FP8).float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter rounds wrongly to fp8")
def test_kernels_round_as_the_reference_does(device):
    """The kernel rounds products of the rotation elsewhere, so its own rotated keys are the ones to round."""
    angles = torch.rand(64, 64, device=device) * 6
    table = RotaryTable(angles.cos(), angles.sin())
    q, k, v = (torch.randn(32, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    positions, slots = torch.arange(32, device=device), torch.arange(32, device=device)
    rotated = k.clone()
    rotary_reference(q.clone(), rotated, positions, table)
    cache = KVCache(*torch.zeros(2, 3, 4, 16, 128, device=device).to(FP8), KEY_SCALE, VALUE_SCALE)
    rotary_kv_write_triton(q, k, v, positions, table, cache, slots)
    torch.testing.assert_close(k, rotated, rtol=2**-7, atol=2**-7 * 3)
    expected = KVCache(*torch.zeros(2, 3, 4, 16, 128, device=device).to(FP8), KEY_SCALE, VALUE_SCALE)
    still = RotaryTable(torch.ones_like(angles), torch.zeros_like(angles))
    rotary_kv_write_reference(q, k.clone(), v, positions, still, expected, slots)
    assert torch.equal(cache.keys.float(), expected.keys.float())
    assert torch.equal(cache.values.float(), expected.values.float())
