from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels import decode_attention as module
from engine.kernels.decode_attention import decode_attention_reference, decode_attention_triton, num_splits
from engine.kernels.dispatch import decode_attention
from engine.kernels.kv_write import rotary_kv_write_reference
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.paged_attention import paged_attention_reference, paged_attention_triton
from engine.kernels.rms_norm import HeadNorms, head_norms_reference
from engine.kernels.rotary import RotaryTable

from .compare import assert_close
from .paged_problem import PagedProblem, clone, clone_metadata, double

BLOCK = 4


@dataclass
class Step:
    """One new token for each sequence; its key and value are not in the cache yet."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    table: RotaryTable
    cache: KVCache
    meta: AttentionMetadata
    norms: HeadNorms | None = None

    def arguments(self):
        return self.q, self.k, self.v, self.positions, self.table, self.cache, self.meta

    def copy(self):
        """Copy everything that a kernel changes, and the metadata."""
        return replace(
            self,
            q=self.q.clone(),
            k=self.k.clone(),
            v=self.v.clone(),
            cache=clone(self.cache),
            meta=clone_metadata(self.meta),
        )

    def rotated(self):
        """Copy with rotated queries and the new token in the cache, rounded to its dtype."""
        other = self.copy()
        norms = other.norms
        if norms is not None and not norms.last:
            other.q, other.k = head_norms_reference(other.q, other.k, norms)
            norms = None
        rotary_kv_write_reference(*other.arguments()[:-1], other.meta.slot_mapping, norms)
        return other

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5


def problem(device, dtype, *, lengths, heads, kv_heads, dim, half=None, section=None, **order):
    count, half = len(lengths), half or dim // 2
    paged = PagedProblem(
        device,
        dtype,
        lengths=lengths,
        queries=[1] * count,
        written=[length - 1 for length in lengths],
        kv_heads=kv_heads,
        dim=dim,
        block_size=BLOCK,
    )
    fused = torch.randn(count, heads + 2 * kv_heads + 1, dim)
    q, k, v, _ = fused.to(device, dtype).split([heads, kv_heads, kv_heads, 1], dim=1)
    angles = torch.randn(50, half + 3)[:, :half].to(device)
    table = RotaryTable(angles.cos(), angles.sin(), section, **order)
    positions = torch.randint(0, 50, (count,) if section is None else (len(section), count)).to(device)
    return Step(q, k, v, positions, table, paged.cache, paged.meta)


def run(step: Step, window=None, cap=None):
    """Compare the kernel with the two references one after the other."""
    rotated = step.rotated()
    expected = paged_attention_reference(
        rotated.q.double(), double(rotated.cache), step.meta, scale=step.scale, window=window, cap=cap
    )
    options = {"norms": step.norms, "window": window, "cap": cap}
    result = decode_attention_triton(*step.arguments(), scale=step.scale, **options)
    assert_close(result, expected)
    for cache, written in zip(
        (step.cache.keys, step.cache.values), (rotated.cache.keys, rotated.cache.values), strict=True
    ):
        assert torch.equal(cache.isnan(), written.isnan()), "the kernel wrote another KV slot"
        assert_close(cache.nan_to_num(), written.nan_to_num())


CASES = {
    "many": {"lengths": [1, 5, 16, 17, 70], "heads": 4, "kv_heads": 2, "dim": 16},
    "one long": {"lengths": [333], "heads": 2, "kv_heads": 1, "dim": 32},
    "one short": {"lengths": [1], "heads": 2, "kv_heads": 1, "dim": 32},
    "two, seven heads": {"lengths": [150, 31], "heads": 7, "kv_heads": 1, "dim": 16},
    "no groups": {"lengths": [130, 64], "heads": 3, "kv_heads": 3, "dim": 16},
    "head of 96": {"lengths": [20, 137], "heads": 2, "kv_heads": 2, "dim": 96},
    "half rotated": {"lengths": [40, 3], "heads": 4, "kv_heads": 2, "dim": 24, "half": 6},
    "neighbours": {"lengths": [40, 3], "heads": 4, "kv_heads": 2, "dim": 24, "half": 6, "adjacent": True},
    "axes": {"lengths": [33, 65], "heads": 4, "kv_heads": 2, "dim": 16, "section": (2, 3, 3)},
    "four axes": {"lengths": [9], "heads": 4, "kv_heads": 2, "dim": 16, "section": (1, 2, 2, 3)},
}


def force_splits(monkeypatch, splits):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)


@pytest.mark.covering(1)
@pytest.mark.parametrize("splits", [1, 3, 32])
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_reference(device, dtype, case, splits, monkeypatch):
    force_splits(monkeypatch, splits)
    run(problem(device, dtype, **CASES[case]))


@pytest.mark.covering(1)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("change", [{"window": 11}, {"window": 100}, {"interleaved": True}, {"cap": 2.0}])
def test_options(device, dtype, change, splits, monkeypatch):
    force_splits(monkeypatch, splits)
    interleaved = "interleaved" in change
    step = problem(
        device,
        dtype,
        lengths=[30, 270, 1],
        heads=4,
        kv_heads=2,
        dim=16,
        section=(2, 3, 3) if interleaved else None,
        interleaved=interleaved,
    )
    step.q *= 8
    run(step, change.get("window"), change.get("cap"))


@pytest.mark.covering(1)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("offset", "last"), [(None, False), (1.0, False), (None, True)])
@pytest.mark.parametrize("case", ["many", "head of 96", "half rotated", "neighbours"])
def test_norms_of_heads(device, dtype, case, offset, last, splits, monkeypatch):
    force_splits(monkeypatch, splits)
    step = problem(device, dtype, **CASES[case])
    step.norms = HeadNorms(*torch.randn(2, CASES[case]["dim"]).to(device, dtype), 1e-5, offset, last)
    step.q *= 3
    options = {"scale": step.scale, "norms": step.norms}
    expected = decode_attention_reference(*step.copy().arguments(), **options)
    assert_close(decode_attention_triton(*step.copy().arguments(), **options), expected)
    run(step)


@pytest.mark.covering(1)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("case", ["many", "one short", "head of 96", "half rotated"])
def test_borrowed_keys(device, dtype, case, window, splits, monkeypatch):
    """The new token's key is in the cache: the result is that of a step that puts it there."""
    force_splits(monkeypatch, splits)
    step = problem(device, dtype, **CASES[case])
    step.norms = HeadNorms(*torch.randn(2, CASES[case]["dim"]).to(device, dtype), 1e-5)
    written = step.rotated()
    expected = paged_attention_reference(
        written.q.double(), double(written.cache), step.meta, scale=step.scale, window=window
    )
    before, options = clone(written.cache), {"scale": step.scale, "norms": step.norms, "window": window}
    for run_one in (decode_attention_triton, decode_attention_reference):
        q = step.q.clone()
        found = run_one(q, None, None, step.positions, step.table, written.cache, step.meta, **options)
        assert_close(found, expected)
    torch.testing.assert_close(written.cache.keys, before.keys, rtol=0, atol=0, equal_nan=True)


def test_blocks_with_others_between(device, dtype):
    """A layer's blocks are parts of wider ones, and the rest stays as it is."""
    step = problem(device, dtype, **CASES["many"])
    wide = [
        torch.full((len(x), 3, *x.shape[1:]), torch.nan).to(x) for x in (step.cache.keys, step.cache.values)
    ]
    for whole, part in zip(wide, (step.cache.keys, step.cache.values), strict=True):
        whole[:, 1] = part
    step.cache = KVCache(wide[0][:, 1], wide[1][:, 1])
    expected = decode_attention_reference(
        *replace(step.copy(), cache=clone(step.cache)).arguments(), scale=0.25
    )
    assert_close(decode_attention_triton(*step.arguments(), scale=0.25), expected)
    assert all(whole[:, ::2].isnan().all() for whole in wide)
    assert_close(paged_attention_triton(step.rotated().q, step.cache, step.meta, scale=0.25), expected)


def test_a_token_without_a_slot_is_seen_and_not_written(device):
    step = problem(device, torch.float32, lengths=[9, 6], heads=2, kv_heads=1, dim=16)
    written = step.copy()
    before = clone(step.cache)
    step.meta.slot_mapping[1] = -1
    result = decode_attention_triton(*step.arguments(), scale=0.25)
    assert_close(result, decode_attention_triton(*written.arguments(), scale=0.25))
    block, offset = divmod(int(written.meta.slot_mapping[0]), BLOCK)
    for cache, old in ((step.cache.keys, before.keys), (step.cache.values, before.values)):
        old[block, :, offset] = cache[block, :, offset]
        torch.testing.assert_close(cache, old, equal_nan=True)


def test_split_counters_are_zero_again(device):
    """Also where some splits have no keys, and where there are more rows of counters than sequences."""
    counters = torch.zeros((5, 2), dtype=torch.int32, device=device)
    for lengths in ([300, 3], [3, 300], [70, 140, 1]):
        step = problem(device, torch.float32, lengths=lengths, heads=4, kv_heads=2, dim=16)
        expected = decode_attention_reference(*step.copy().arguments(), scale=0.25)
        step.meta.split_counters = counters
        assert_close(decode_attention_triton(*step.arguments(), scale=0.25), expected)
        assert not counters.any()


def test_no_sequences(device):
    step = problem(device, torch.float32, lengths=[9], heads=2, kv_heads=1, dim=16)
    step.q, step.k, step.v, step.positions = (x[:0] for x in (step.q, step.k, step.v, step.positions))
    meta = step.meta
    step.meta = replace(
        meta,
        slot_mapping=meta.slot_mapping[:0],
        block_tables=meta.block_tables[:0],
        seq_lens=meta.seq_lens[:0],
    )
    for run in (decode_attention, decode_attention_triton):
        assert run(*step.arguments(), scale=0.25).shape == (0, 2, 16)


def test_splits_fill_small_grids_only():
    assert num_splits(2, 132, 100_000, 64) == 32
    assert num_splits(64, 132, 100_000, 64) == 5
    assert num_splits(256, 132, 100_000, 64) == 2
    assert num_splits(1000, 132, 100_000, 64) == 1
    assert num_splits(2, 132, 100, 64) == 2


TILES = {number: module.choose_tile(128, 4, 2, number, sms=132, max_seq_len=4096) for number in (4, 32, 400)}


def test_tiles():
    """One program per SM, a few per SM, and many, which get smaller tiles."""
    alone, some, many = (TILES[number] for number in (4, 32, 400))
    assert alone.warps > some.warps > many.warps == 1
    assert alone.splits > some.splits > many.splits == 1
    assert many.keys < some.keys


def tried_tiles() -> list[int]:
    """The keys of ``TILES``, without tiles that are the same to the interpreter, which knows no warps."""
    if torch.cuda.is_available():
        return list(TILES)
    distinct: dict[tuple[int, int], int] = {}
    for number, tile in TILES.items():
        distinct.setdefault((tile.rows, tile.keys), number)
    return list(distinct.values())


@pytest.mark.covering(2)
@pytest.mark.parametrize("splits", [1, 12])
@pytest.mark.parametrize("programs", tried_tiles())
@pytest.mark.parametrize("case", ["many", "one long", "two, seven heads", "head of 96"])
def test_every_tile(device, dtype, case, programs, splits, monkeypatch):
    monkeypatch.setattr(module, "choose_tile", lambda *_, **__: replace(TILES[programs], splits=splits))
    run(problem(device, dtype, **CASES[case]))


@pytest.mark.gpu
def test_a_captured_graph_stays_valid_while_sequences_grow(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    step = problem(device, torch.bfloat16, lengths=[200, 900], heads=8, kv_heads=2, dim=128)
    kept = step.copy()
    step.meta.seq_lens.fill_(3)
    step.meta.split_counters = torch.zeros((2, 2), dtype=torch.int32, device=device)
    decode_attention(*step.arguments(), scale=step.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*step.arguments(), scale=step.scale)
    rotated = kept.rotated()
    expected = paged_attention_reference(
        rotated.q.double(), double(rotated.cache), kept.meta, scale=step.scale
    )
    for name in ("q", "k", "v"):
        getattr(step, name).copy_(getattr(kept, name))
    step.cache.keys.copy_(kept.cache.keys)
    step.cache.values.copy_(kept.cache.values)
    step.meta.seq_lens.copy_(kept.meta.seq_lens)
    for _ in range(20):
        graph.replay()
        assert_close(out, expected)
