import pytest
import torch

from engine.kernels.paged import KVCache
from engine.kernels.paged_attention import paged_attention_reference
from engine.kernels.prefill_attention import prefill_attention_gluon, supports

from .compare import assert_close
from .paged_problem import double
from .test_paged_attention import problem

CASES = {
    "one prompt": {"lengths": [300], "queries": [300], "heads": 8, "kv_heads": 2, "dim": 128},
    "all kinds": {
        "lengths": [300, 50, 1000, 129, 640, 7],
        "queries": [300, 1, 7, 129, 65, 0],
        "heads": 14,
        "kv_heads": 2,
        "dim": 128,
    },
    "single rows": {
        "lengths": [1, 17, 128, 5],
        "queries": [1, 1, 1, 5],
        "heads": 12,
        "kv_heads": 2,
        "dim": 64,
    },
    "no groups": {"lengths": [457, 33], "queries": [200, 33], "heads": 4, "kv_heads": 4, "dim": 128},
    "many sequences": {
        "lengths": [5] * 66 + [300, 9],
        "queries": [1] * 66 + [300, 0],
        "heads": 4,
        "kv_heads": 2,
        "dim": 64,
    },
    "many heads a group": {"lengths": [256, 9], "queries": [40, 9], "heads": 32, "kv_heads": 1, "dim": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [8, 16, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("paired", [False, True])
def test_equals_reference(hopper, dtype, case, block_size, paired):
    q, paged = problem(hopper, dtype, **CASES[case], block_size=block_size, padding=3)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=hopper)
    live = int(paged.meta.query_start[-1])
    assert supports(q, paged.cache)
    result = prefill_attention_gluon(q, paged.cache, paged.meta, scale=0.1, paired=paired, out=out)
    assert result[live:].isnan().all(), "padding rows were written"
    expected = paged_attention_reference(q.double(), double(paged.cache), paged.meta, scale=0.1)
    assert_close(result[:live], expected[:live])


@pytest.mark.gpu
@pytest.mark.parametrize("paired", [False, True])
def test_the_same_prompt_gives_the_same_bits(hopper, paired):
    """Warps work in parallel: a read of a tile that is not loaded yet would show now and then."""
    sizes = {"lengths": [2500], "queries": [2100], "heads": 16, "kv_heads": 4, "dim": 128}
    q, paged = problem(hopper, torch.bfloat16, **sizes, block_size=16)
    first = prefill_attention_gluon(q, paged.cache, paged.meta, scale=0.1, paired=paired)
    for _ in range(50):
        assert torch.equal(
            prefill_attention_gluon(q, paged.cache, paged.meta, scale=0.1, paired=paired), first
        )


def test_only_hopper_and_16_bit_heads_are_supported(monkeypatch):
    q, blocks = torch.zeros(4, 4, 128, dtype=torch.bfloat16), torch.zeros(2, 2, 16, 128, dtype=torch.bfloat16)
    cache = KVCache(blocks, blocks)
    assert not supports(q, cache)
    monkeypatch.setattr("engine.kernels.prefill_attention.is_hopper", lambda _: True)
    assert supports(q, cache)
    for other in (blocks.float(), blocks.half(), blocks[:, :, :4].contiguous()):
        assert not supports(q if other.element_size() == 2 else q.float(), KVCache(other, other))
    narrow = blocks[..., :96].contiguous()
    assert not supports(q[..., :96], KVCache(narrow, narrow))
