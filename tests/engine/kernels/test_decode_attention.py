import pytest
import torch

from engine.kernels import decode_attention as module
from engine.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    decode_attention_triton,
    num_splits,
)
from engine.kernels.kv_write import rotary_kv_write_reference
from engine.kernels.paged_attention import paged_attention_reference

from .compare import assert_close

BLOCK = 4


def problem(device, dtype, *, lengths, heads, kv_heads, dim, half=None, section=None):
    """One new token for sequences over scattered blocks; what must not be read is NaN."""
    count, half = len(lengths), half or dim // 2
    needed = [-(-length // BLOCK) for length in lengths]
    order = (torch.randperm(sum(needed)) + 1).tolist()
    tables = torch.zeros((count, max(needed) + 1), dtype=torch.int32)
    shape = (sum(needed) + 1, kv_heads, BLOCK, dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    slots = []
    for index, (length, blocks) in enumerate(zip(lengths, needed, strict=True)):
        own = [order.pop() for _ in range(blocks)]
        tables[index, :blocks] = torch.tensor(own, dtype=torch.int32)
        for position in range(length - 1):
            block, offset = own[position // BLOCK], position % BLOCK
            k_cache[block, :, offset] = torch.randn(kv_heads, dim)
            v_cache[block, :, offset] = torch.randn(kv_heads, dim)
        slots.append(own[-1] * BLOCK + (length - 1) % BLOCK)
    fused = torch.randn(count, heads + 2 * kv_heads + 1, dim)
    q, k, v, _ = fused.to(device, dtype).split([heads, kv_heads, kv_heads, 1], dim=1)
    table = torch.randn(50, half + 3)[:, :half].to(device)
    positions = torch.randint(0, 50, (count,) if section is None else (3, count))
    arguments = [q, k, v, positions.to(device), table.cos(), table.sin()]
    arguments += [k_cache.to(device, dtype), v_cache.to(device, dtype)]
    arguments += [
        x.to(device) for x in (torch.tensor(slots), tables, torch.tensor(lengths, dtype=torch.int32))
    ]
    return arguments, {"scale": dim**-0.5, "max_seq_len": 4096, "mrope_section": section}


def double(arguments):
    """Copies in float64 of all but the rotary tables and what counts."""
    return [
        x.double() if x.is_floating_point() and index not in (4, 5) else x.clone()
        for index, x in enumerate(arguments)
    ]


def run(arguments, options, **more):
    """The kernel against the two references in a row; the rotated key is rounded as the cache rounds it."""
    rotated = [x.clone() for x in arguments]
    rotary = {key: value for key, value in (options | more).items() if key.startswith("mrope")}
    rotary_kv_write_reference(*rotated[:9], **rotary)
    wide = double(rotated)
    starts = torch.arange(len(wide[0]) + 1, dtype=torch.int32)
    attention = {
        key: value for key, value in (options | more).items() if key in ("scale", "window", "softcap")
    }
    wanted = paged_attention_reference(wide[0], *wide[6:8], wide[9], starts, wide[10], **attention)
    found = decode_attention_triton(*arguments, **options, **more)
    assert_close(found, wanted)
    for cache, expected in zip(arguments[6:8], rotated[6:8], strict=True):
        assert torch.equal(cache.isnan(), expected.isnan()), "a place was written that was not the token's"
        assert_close(cache.nan_to_num(), expected.nan_to_num())


CASES = {
    "many": {"lengths": [1, 5, 16, 17, 70], "heads": 4, "kv_heads": 2, "dim": 16},
    "one long": {"lengths": [333], "heads": 2, "kv_heads": 1, "dim": 32},
    "one short": {"lengths": [1], "heads": 2, "kv_heads": 1, "dim": 32},
    "two, seven heads": {"lengths": [150, 31], "heads": 7, "kv_heads": 1, "dim": 16},
    "no groups": {"lengths": [130, 64], "heads": 3, "kv_heads": 3, "dim": 16},
    "head of 96": {"lengths": [20, 137], "heads": 2, "kv_heads": 2, "dim": 96},
    "half rotated": {"lengths": [40, 3], "heads": 4, "kv_heads": 2, "dim": 24, "half": 6},
    "axes": {"lengths": [33, 65], "heads": 4, "kv_heads": 2, "dim": 16, "section": (2, 3, 3)},
}


@pytest.mark.parametrize("splits", [1, 3, 32])
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_reference(device, dtype, case, splits, monkeypatch):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    run(*problem(device, dtype, **CASES[case]))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    "change", [{"window": 11}, {"window": 100}, {"softcap": 5.0}, {"mrope_interleaved": True}]
)
def test_options(device, dtype, change, splits, monkeypatch):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    section = (2, 3, 3) if "mrope_interleaved" in change else None
    sizes = {"lengths": [30, 270, 1], "heads": 4, "kv_heads": 2, "dim": 16, "section": section}
    arguments, options = problem(device, dtype, **sizes)
    arguments[0] *= 8
    run(arguments, options, **change)


def test_a_token_without_a_slot_is_seen_and_not_kept(device):
    arguments, options = problem(device, torch.float32, lengths=[9, 6], heads=2, kv_heads=1, dim=16)
    before = [cache.clone() for cache in arguments[6:8]]
    kept = [x.clone() for x in arguments]
    arguments[8][1] = -1
    found = decode_attention_triton(*arguments, **options)
    assert_close(found, decode_attention_triton(*kept, **options))
    slot = int(kept[8][0])
    for cache, was in zip(arguments[6:8], before, strict=True):
        was[slot // BLOCK, :, slot % BLOCK] = cache[slot // BLOCK, :, slot % BLOCK]
        torch.testing.assert_close(cache, was, equal_nan=True)


def test_arrivals_are_zero_again(device):
    """Also where the lengths leave some of the splits without keys, and where there are more rows."""
    arrivals = torch.zeros((5, 2), dtype=torch.int32, device=device)
    for lengths in ([300, 3], [3, 300], [70, 140, 1]):
        arguments, options = problem(device, torch.float32, lengths=lengths, heads=4, kv_heads=2, dim=16)
        wanted = decode_attention_reference(*[x.clone() for x in arguments], **options)
        assert_close(decode_attention_triton(*arguments, **options, arrivals=arrivals), wanted)
        assert not arrivals.any()


def test_no_sequences(device):
    arguments, options = problem(device, torch.float32, lengths=[9], heads=2, kv_heads=1, dim=16)
    empty = [x[:0] if index in (0, 1, 2, 3, 8, 9, 10) else x for index, x in enumerate(arguments)]
    assert decode_attention(*empty, **options).shape == (0, 2, 16)
    assert decode_attention_triton(*empty, **options).shape == (0, 2, 16)


def test_splits_fill_small_grids_only():
    assert num_splits(2, 132, 100_000, 64) == 32
    assert num_splits(64, 132, 100_000, 64) == 5
    assert num_splits(256, 132, 100_000, 64) == 2
    assert num_splits(1000, 132, 100_000, 64) == 1
    assert num_splits(2, 132, 100, 64) == 2


TILES = {
    number: module.tiling(128, 4, 2, number, processors=132, max_seq_len=4096) for number in (4, 32, 400)
}


def test_tiles():
    """A processor for each program, some, and so many that they are cut smaller."""
    alone, some, many = (TILES[number] for number in (4, 32, 400))
    assert alone[0].warps > some[0].warps > many[0].warps == 1
    assert alone[1] > some[1] > many[1] == 1
    assert many[0].keys < some[0].keys


@pytest.mark.parametrize("splits", [1, 12])
@pytest.mark.parametrize("programs", TILES)
@pytest.mark.parametrize("case", ["many", "one long", "two, seven heads", "head of 96"])
def test_every_tile(device, dtype, case, programs, splits, monkeypatch):
    monkeypatch.setattr(module, "tiling", lambda *_: (TILES[programs][0], splits))
    run(*problem(device, dtype, **CASES[case]))


@pytest.mark.gpu
def test_a_captured_graph_stays_valid_while_sequences_grow(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    arguments, options = problem(device, torch.bfloat16, lengths=[200, 900], heads=8, kv_heads=2, dim=128)
    kept = [x.clone() for x in arguments]
    arguments[10].fill_(3)
    arrivals = torch.zeros((2, 2), dtype=torch.int32, device=device)
    decode_attention(*arguments, **options, arrivals=arrivals)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*arguments, **options, arrivals=arrivals)
    for mine, was in zip(arguments, kept, strict=True):
        mine.copy_(was)
    for _ in range(20):
        graph.replay()
        assert_close(out, decode_attention_reference(*double(kept), **options))
