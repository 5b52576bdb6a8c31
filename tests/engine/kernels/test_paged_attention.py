from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from engine.kernels.dispatch import paged_attention
from engine.kernels.paged_attention import paged_attention_reference, paged_attention_triton

from .compare import assert_close
from .paged_problem import PagedProblem, double


def problem(device, dtype, *, lengths, queries, heads, kv_heads, dim, block_size, padding=0):
    """Queries and a cache that holds all tokens already."""
    sizes = {"kv_heads": kv_heads, "dim": dim, "block_size": block_size}
    paged = PagedProblem(device, dtype, lengths=lengths, queries=queries, written=lengths, **sizes)
    # Queries are a part of a wider projection, as in the model.
    q = torch.randn(sum(queries) + padding, heads + 2, dim)[:, :heads].to(device, dtype)
    return q, paged


def run(q, paged, **options):
    options = {"scale": q.shape[-1] ** -0.5, **options}
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    live = int(paged.meta.query_start[-1])
    result = paged_attention_triton(q, paged.cache, paged.meta, **options, out=out)
    assert result[live:].isnan().all(), "padding rows were written"
    expected = paged_attention_reference(q.double(), double(paged.cache), paged.meta, **options)
    assert_close(result[:live], expected[:live])


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
    run(*problem(device, dtype, **CASES[case], block_size=block_size, padding=3))


@pytest.mark.parametrize("queries", [[1, 1, 1], [30, 1, 45]])
def test_sliding_window(device, dtype, queries):
    sizes = {"lengths": [30, 70, 45], "queries": queries, "heads": 4, "kv_heads": 2, "dim": 16}
    run(*problem(device, dtype, **sizes, block_size=8), window=11)


@pytest.mark.parametrize("window", [None, 11])
def test_capped_scores(device, dtype, window):
    sizes = {"lengths": [30, 70, 45], "queries": [30, 1, 45], "heads": 4, "kv_heads": 2, "dim": 16}
    q, paged = problem(device, dtype, **sizes, block_size=8)
    q *= 8
    run(q, paged, window=window, cap=2.0)


def test_reference_caps_scores_as_transformers():
    sizes = {"lengths": [33, 7], "queries": [33, 1], "heads": 6, "kv_heads": 2, "dim": 16}
    q, paged = problem("cpu", torch.float32, **sizes, block_size=4)
    q *= 8
    result = paged_attention_reference(q, paged.cache, paged.meta, scale=0.25, cap=2.0)
    row, module = 0, SimpleNamespace(num_key_value_groups=3, training=False)
    for (k, v), count in zip(paged.contiguous, sizes["queries"], strict=True):
        visible = torch.ones(count, len(k), dtype=torch.bool).tril(len(k) - count)
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        parts = (x.transpose(0, 1)[None] for x in (q[row : row + count], k, v))
        expected, _ = eager_attention_forward(module, *parts, mask[None, None], scaling=0.25, softcap=2.0)
        torch.testing.assert_close(result[row : row + count], expected[0], atol=1e-5, rtol=1e-5)
        row += count


def both_ways(paged, queries, spans, gaps=None):
    """Let tokens ``[start, end)`` of a sequence, for each of its ``spans``, see all keys before ``end``, but
    for those in ``gaps``, which neither do so nor are seen so."""
    ends = []
    for length, count, ranges, holes in zip(
        paged.meta.seq_lens.tolist(), queries, spans, gaps or [()] * len(spans), strict=True
    ):
        every = torch.arange(1, length + 1)
        for start, end in ranges:
            every[start:end] = end
        for start, end in holes:
            every[start:end] = torch.arange(start + 1, end + 1)
        ends.append(every[length - count :])
    padding = torch.zeros(3)
    paged.meta.key_ends = torch.cat([*ends, padding]).int().to(paged.meta.seq_lens.device)
    paged.meta.gaps = gaps is not None


#: Spans at a chunk's start, over several tiles, next to each other, at the end, and none.
SPANS = ([(0, 70), (71, 73)], [(40, 110), (110, 150)], [], [(33, 37)])
#: Within tiles and over several, of one token, and next to a span's start and end.
GAPS = ([(1, 9), (20, 60)], [(41, 42), (60, 61), (100, 109), (111, 149)], [], [(34, 36)])
SPANNED = {"lengths": [90, 150, 9, 37], "queries": [90, 110, 1, 37], "heads": 4, "kv_heads": 2, "dim": 16}


@pytest.mark.parametrize("gaps", [None, GAPS], ids=["whole", "gaps"])
@pytest.mark.parametrize("window", [None, 1, 11, 60])
def test_spans_that_attend_both_ways(device, dtype, window, gaps):
    q, paged = problem(device, dtype, **SPANNED, block_size=8, padding=3)
    both_ways(paged, SPANNED["queries"], SPANS, gaps)
    run(q, paged, window=window)


@pytest.mark.parametrize("gaps", [None, GAPS], ids=["whole", "gaps"])
@pytest.mark.parametrize("window", [None, 11])
def test_reference_with_spans_equals_sdpa(window, gaps):
    q, paged = problem("cpu", torch.float32, **SPANNED, block_size=8, padding=3)
    both_ways(paged, SPANNED["queries"], SPANS, gaps)
    result = paged_attention_reference(q, paged.cache, paged.meta, scale=16**-0.5, window=window)
    row = 0
    for (k, v), count, spans, holes in zip(
        paged.contiguous, SPANNED["queries"], SPANS, gaps or [()] * 4, strict=True
    ):
        sees = torch.ones(len(k), dtype=torch.bool)
        for start, end in holes:
            sees[start:end] = False
        key, query = torch.arange(len(k)), torch.arange(len(k) - count, len(k))[:, None]
        mask = key <= query
        for start, end in spans:
            inside = (query >= start) & (query < end) & (key >= start) & (key < end)
            mask |= inside & sees[query] & sees[key]
        if window is not None:
            mask &= key > query - window
        parts = (x.transpose(0, 1)[None] for x in (q[row : row + count], k, v))
        expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(result[row : row + count], expected, atol=1e-5, rtol=1e-5)
        row += count


def test_reference_equals_sdpa():
    sizes = {"lengths": [33, 7, 20], "queries": [33, 1, 6], "heads": 6, "kv_heads": 2, "dim": 16}
    q, paged = problem("cpu", torch.float32, **sizes, block_size=4)
    result = paged_attention_reference(q, paged.cache, paged.meta, scale=16**-0.5)
    row = 0
    for (k, v), count in zip(paged.contiguous, sizes["queries"], strict=True):
        length = len(k)
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        parts = (x.transpose(0, 1)[None] for x in (q[row : row + count], k, v))
        expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(result[row : row + count], expected, atol=1e-5, rtol=1e-5)
        row += count


@pytest.mark.gpu
def test_a_captured_graph_stays_valid_while_sequences_grow(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    sizes = {"lengths": [200, 900], "queries": [1, 1], "heads": 8, "kv_heads": 2, "dim": 128}
    q, paged = problem(device, torch.bfloat16, **sizes, block_size=16)
    lengths = paged.meta.seq_lens
    full = lengths.clone()
    lengths.fill_(3)
    paged_attention(q, paged.cache, paged.meta, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, paged.cache, paged.meta, scale=0.1)
    lengths.copy_(full)
    graph.replay()
    assert_close(out, paged_attention_reference(q.double(), double(paged.cache), paged.meta, scale=0.1))
