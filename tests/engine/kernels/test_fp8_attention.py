"""Decode attention in Gluon over a cache in fp8 equals the reference; it needs a Hopper GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from engine.kernels import fp8_attention as module
from engine.kernels.decode_attention import decode_attention_reference
from engine.kernels.dispatch import decode_attention, paged_attention
from engine.kernels.fp8 import FP8
from engine.kernels.fp8_attention import (
    choose_warps,
    decode_attention_gluon,
    num_splits,
    single_attention_gluon,
)
from engine.kernels.launch import compiling
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.paged_attention import paged_attention_reference
from engine.kernels.rms_norm import HeadNorms
from engine.kernels.rotary import RotaryTable

from .compare import assert_close
from .paged_problem import PagedProblem

KEY_SCALE, VALUE_SCALE = 0.25, 2.0
#: On both sides of the keys of a warp's tile and of a program's, and several of these.
LENGTHS = [1, 2, 16, 17, 18, 64, 65, 66, 131, 700]


@dataclass(frozen=True)
class Shape:
    """Heads, and what else the kernel is compiled for."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    block_size: int = 16
    window: int | None = None
    cap: float | None = None
    norm_offset: float | None = None
    norms: bool = False
    norms_last: bool = False
    half: int | None = None
    adjacent: bool = False
    section: tuple[int, ...] | None = None


SHAPES = {
    "no groups": Shape(3, 3),
    "groups of seven": Shape(14, 2),
    "groups of eight": Shape(8, 1),
    "groups of nine": Shape(18, 2, window=40),
    "groups of sixteen": Shape(16, 1, norms=True),
    "64": Shape(dim=64),
    "norms": Shape(norms=True),
    "norms with an offset": Shape(norms=True, norm_offset=1.0, dim=64),
    "norms behind the rotation": Shape(norms=True, norms_last=True),
    "short window": Shape(window=9),
    "window": Shape(window=150),
    "cap": Shape(cap=2.0),
    "half rotated": Shape(half=32),
    "neighbours": Shape(adjacent=True),
    "axes": Shape(section=(16, 24, 24)),
    "tiny blocks": Shape(block_size=2),
    "blocks of several tiles": Shape(block_size=256),
    "blocks of a program's tile": Shape(block_size=64, dim=64),
}


class Problem:
    """Sequences of ``LENGTHS``, each with a new token whose key and value are exact in fp8 unless rotated."""

    def __init__(self, device, dtype, shape: Shape, *, rotated: bool) -> None:
        count, self.shape = len(LENGTHS), shape
        written = [length - 1 for length in LENGTHS]
        sizes = {"kv_heads": shape.kv_heads, "dim": shape.dim, "block_size": shape.block_size}
        paged = PagedProblem(
            device, torch.float32, lengths=LENGTHS, queries=[1] * count, written=written, **sizes
        )
        keys, values = (paged.cache.keys / KEY_SCALE).to(FP8), (paged.cache.values / VALUE_SCALE).to(FP8)
        self.cache, self.meta = KVCache(keys, values, KEY_SCALE, VALUE_SCALE), paged.meta
        scales = torch.tensor([1.0, KEY_SCALE, VALUE_SCALE]).repeat_interleave(
            torch.tensor([shape.heads, shape.kv_heads, shape.kv_heads])
        )
        rows = torch.randn(count, len(scales), shape.dim).to(FP8).float() * scales[:, None]
        self.q, self.k, self.v = rows.to(device, dtype).split(
            [shape.heads, shape.kv_heads, shape.kv_heads], dim=1
        )
        angles = torch.rand(50, shape.half or shape.dim // 2) * (6 if rotated else 0)
        self.table = RotaryTable(
            angles.cos().to(device), angles.sin().to(device), shape.section, adjacent=shape.adjacent
        )
        axes = () if shape.section is None else (len(shape.section),)
        self.positions = torch.randint(0, 50, (*axes, count), device=device)
        weights = torch.rand(2, shape.dim).to(device, dtype) + 0.5
        self.norms = HeadNorms(*weights, 1e-6, shape.norm_offset, shape.norms_last) if shape.norms else None

    def run(self, function, cache=None):
        """Return the result of a copy, and the cache afterwards."""
        keys, values = self.cache.keys.clone(), self.cache.values.clone()
        copy = KVCache(keys, values, KEY_SCALE, VALUE_SCALE)
        limits = {"scale": 0.15, "window": self.shape.window, "cap": self.shape.cap, "norms": self.norms}
        arguments = (self.q.clone(), self.k.clone(), self.v, self.positions, self.table, copy, self.meta)
        return function(*arguments, **limits), copy


def bits(cache: KVCache) -> torch.Tensor:
    return torch.stack([cache.keys, cache.values]).view(torch.uint8)


@pytest.mark.gpu
@pytest.mark.covering(1)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gluon_equals_reference(hopper, dtype, shape, warps, splits, monkeypatch):
    monkeypatch.setattr(module, "choose_warps", lambda *_: warps)
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    problem = Problem(hopper, dtype, SHAPES[shape], rotated=True)
    expected, _ = problem.run(decode_attention_reference)
    found, _ = problem.run(decode_attention_gluon)
    assert_close(found, expected, tolerance=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "shape",
    ["no groups", "groups of seven", "groups of nine", "64", "tiny blocks", "blocks of several tiles"],
)
def test_the_new_token_is_written_and_nothing_else(hopper, shape, splits, monkeypatch):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    problem = Problem(hopper, torch.bfloat16, SHAPES[shape], rotated=False)
    problem.meta.slot_mapping[3] = -1
    counters = torch.zeros(len(LENGTHS) + 1, SHAPES[shape].kv_heads, dtype=torch.int32, device=hopper)
    problem.meta.split_counters = counters
    (expected, written), (found, cache) = map(
        problem.run, (decode_attention_reference, decode_attention_gluon)
    )
    for ours, theirs in ((cache.keys, written.keys), (cache.values, written.values)):
        # Zeros may differ in their signs.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)
    assert not counters.any()
    # The reference doesn't see a token that has no slot.
    seen = torch.arange(len(LENGTHS), device=hopper) != 3
    assert_close(found[seen], expected[seen])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["groups of seven", "64", "window"])
def test_borrowed_keys(hopper, shape):
    """Keys and values that an earlier layer has written."""
    problem = Problem(hopper, torch.bfloat16, SHAPES[shape], rotated=False)
    _, written = problem.run(decode_attention_reference)
    options = {"scale": 0.15, "window": SHAPES[shape].window}
    expected = paged_attention_reference(problem.q, written, problem.meta, **options)
    before = bits(written).clone()
    found = decode_attention_gluon(
        problem.q, None, None, problem.positions, problem.table, written, problem.meta, **options
    )
    assert_close(found, expected)
    assert torch.equal(bits(written), before)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("shape", ["groups of seven", "groups of nine", "64", "window", "tiny blocks"])
def test_single_tokens_beside_prompts(hopper, shape, warps, splits, monkeypatch):
    """Of a batch of sequences with one new token, several or none, those with one are computed apart."""
    monkeypatch.setattr(module, "choose_warps", lambda *_: warps)
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    kind, queries = SHAPES[shape], [1, 2, 0, 1, 18, 1, 1, 60, 1, 300]
    sizes = {"kv_heads": kind.kv_heads, "dim": kind.dim, "block_size": kind.block_size}
    paged = PagedProblem(hopper, torch.float32, lengths=LENGTHS, queries=queries, written=LENGTHS, **sizes)
    keys, values = (paged.cache.keys / KEY_SCALE).to(FP8), (paged.cache.values / VALUE_SCALE).to(FP8)
    cache = KVCache(keys, values, KEY_SCALE, VALUE_SCALE)
    q = torch.randn(sum(queries), kind.heads, kind.dim, device=hopper, dtype=torch.bfloat16)
    options = {"scale": 0.15, "window": kind.window}
    expected = paged_attention_reference(q, cache, paged.meta, **options)
    found = single_attention_gluon(q, cache, paged.meta, **options, out=torch.full_like(q, torch.nan))
    single = torch.tensor(queries).repeat_interleave(torch.tensor(queries)) == 1
    assert_close(found[single], expected[single])
    assert found[~single].isnan().all()
    assert_close(paged_attention(q, cache, paged.meta, **options), expected)


@pytest.mark.gpu
def test_kinds_that_it_does_not_support_have_another_kernel(hopper):
    for shape in (Shape(17, 1), Shape(dim=96), Shape(block_size=1)):
        problem = Problem(hopper, torch.bfloat16, shape, rotated=False)
        assert not module.supports(problem.q, problem.cache)
        assert_close(problem.run(decode_attention)[0], problem.run(decode_attention_reference)[0])
    assert module.supports(problem.q, Problem(hopper, torch.bfloat16, Shape(), rotated=False).cache)


def test_start_up_compiles_the_kernels_of_all_numbers_of_sequences(monkeypatch):
    launched: set[tuple[int, bool]] = set()
    monkeypatch.setattr(
        module, "launch", lambda *_, **given: launched.add((given["num_warps"], given["SPLIT"]))
    )
    monkeypatch.setattr(module, "num_sms", lambda _: 132)
    monkeypatch.setattr(module, "pdl_options", lambda _: {"PDL": False})

    def attend(sequences: int, longest: int) -> None:
        meta = AttentionMetadata(
            block_tables=torch.zeros(sequences, 1, dtype=torch.int32),
            query_start=torch.arange(sequences + 1, dtype=torch.int32),
            seq_lens=torch.full((sequences,), 16, dtype=torch.int32),
            slot_mapping=torch.zeros(sequences, dtype=torch.int64),
            max_query_len=2,
            max_seq_len=longest,
        )
        cache = KVCache(*torch.zeros(2, 1, 32, 16, 64).to(FP8))
        q = torch.zeros(sequences, 32, 64, dtype=torch.bfloat16)
        single_attention_gluon(q, cache, meta, scale=1.0)

    # On both sides of where keys are split, and where a warp is alone.
    for sequences, longest in [(2, 16), (2, 4096), (16, 4096), (17, 4096), (33, 4096), (34, 4096)]:
        attend(sequences, longest)
    served, expected = launched.copy(), {(1, False), (1, True), (2, False), (2, True)}
    assert served == expected
    launched.clear()
    with compiling():
        attend(16, 4096)
    assert launched == expected


def test_programs_fill_the_gpu_once():
    for programs, length, chosen in [
        (1, 100_000, (2, 32)),
        (8, 128, (2, 4)),
        (256, 4096, (2, 4)),
        (1056, 4096, (1, 2)),
        (2048, 4096, (1, 1)),
        (8192, 640, (1, 1)),
    ]:
        warps = choose_warps(programs, 16 * 132)
        assert (warps, num_splits(programs, warps, 16 * 132, length)) == chosen
