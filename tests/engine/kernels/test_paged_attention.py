import pytest
import torch
import torch.nn.functional as F

from engine.kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    paged_attention_triton,
)

from .compare import assert_close


def problem(device, dtype, *, lengths, queries, heads, kv_heads, dim, block_size, padding=0):
    """Sequences over scattered blocks; everything that must not be read is NaN."""
    needed = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(needed)) + 1).tolist()
    width = max(needed) + 1
    tables = torch.zeros((len(lengths), width), dtype=torch.int32)
    shape = (sum(needed) + 1, kv_heads, block_size, dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    contiguous = []
    for index, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[index, :count] = torch.tensor(blocks, dtype=torch.int32)
        k, v = torch.randn(length, kv_heads, dim), torch.randn(length, kv_heads, dim)
        contiguous.append((k, v))
        for position in range(length):
            block, offset = blocks[position // block_size], position % block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = k[position], v[position]
    # Queries are a part of a wider projection, as in the model.
    q = torch.randn(sum(queries) + padding, heads + 2, dim)[:, :heads]
    start = torch.tensor([0, *queries]).cumsum(0).int()
    arguments = [q, k_cache, v_cache, tables, start, torch.tensor(lengths, dtype=torch.int32)]
    floats = {0, 1, 2}
    moved = [x.to(device, dtype) if i in floats else x.to(device) for i, x in enumerate(arguments)]
    options = {"scale": dim**-0.5}
    return moved, options, contiguous


def run(arguments, options, **more):
    out = torch.full(arguments[0].shape, torch.nan, dtype=arguments[0].dtype, device=arguments[0].device)
    live = int(arguments[4][-1])
    found = paged_attention_triton(*arguments, **options, **more, out=out)
    assert found[live:].isnan().all(), "padding rows were touched"
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    wanted = paged_attention_reference(*wide, **options, **more)
    assert_close(found[:live], wanted[:live])


CASES = {
    "decode": {"lengths": [1, 5, 16, 17, 33], "queries": [1] * 5, "heads": 4, "kv_heads": 2, "dim": 16},
    "decode of one long sequence": {"lengths": [333], "queries": [1], "heads": 2, "kv_heads": 1, "dim": 32},
    "prefill": {"lengths": [70, 3], "queries": [70, 3], "heads": 2, "kv_heads": 2, "dim": 32},
    "all kinds": {"lengths": [40, 9, 90, 21], "queries": [1, 9, 37, 0], "heads": 6, "kv_heads": 3, "dim": 24},
    "seven heads a group": {"lengths": [50, 31], "queries": [20, 1], "heads": 7, "kv_heads": 1, "dim": 16},
    "decode, seven heads": {"lengths": [50, 31], "queries": [1, 1], "heads": 7, "kv_heads": 1, "dim": 16},
    "head of 96": {"lengths": [20, 37], "queries": [7, 37], "heads": 2, "kv_heads": 2, "dim": 96},
    "head of 80, chunks": {"lengths": [65, 64], "queries": [1, 64], "heads": 4, "kv_heads": 1, "dim": 80},
    "empty sequence": {"lengths": [12, 8, 5], "queries": [1, 0, 1], "heads": 2, "kv_heads": 1, "dim": 16},
}


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_reference(device, dtype, case, block_size):
    arguments, options, _ = problem(device, dtype, **CASES[case], block_size=block_size, padding=3)
    run(arguments, options)


@pytest.mark.parametrize("queries", [[1, 1, 1], [30, 1, 45]])
def test_sliding_window(device, dtype, queries):
    sizes = {"lengths": [30, 70, 45], "queries": queries, "heads": 4, "kv_heads": 2, "dim": 16}
    arguments, options, _ = problem(device, dtype, **sizes, block_size=8)
    run(arguments, options, window=11)


@pytest.mark.parametrize("queries", [[1, 1], [30, 1]])
def test_soft_cap(device, dtype, queries):
    sizes = {"lengths": [30, 70], "queries": queries, "heads": 4, "kv_heads": 2, "dim": 16}
    arguments, options, _ = problem(device, dtype, **sizes, block_size=8)
    arguments[0] *= 8
    run(arguments, options, softcap=5.0)


def test_reference_equals_sdpa():
    sizes = {"lengths": [33, 7, 20], "queries": [33, 1, 6], "heads": 6, "kv_heads": 2, "dim": 16}
    (q, *rest), options, contiguous = problem("cpu", torch.float32, **sizes, block_size=4)
    found = paged_attention_reference(q, *rest, **options)
    row = 0
    for (k, v), count in zip(contiguous, sizes["queries"], strict=True):
        length = len(k)
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        parts = (x.transpose(0, 1)[None] for x in (q[row : row + count], k, v))
        wanted = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(found[row : row + count], wanted, atol=1e-5, rtol=1e-5)
        row += count


@pytest.mark.gpu
def test_a_captured_graph_stays_valid_while_sequences_grow(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    sizes = {"lengths": [200, 900], "queries": [1, 1], "heads": 8, "kv_heads": 2, "dim": 128}
    arguments, options, _ = problem(device, torch.bfloat16, **sizes, block_size=16)
    lengths = arguments[5]
    full = lengths.clone()
    lengths.fill_(3)
    paged_attention(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*arguments, **options)
    lengths.copy_(full)
    graph.replay()
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    assert_close(out, paged_attention_reference(*wide, **options))
