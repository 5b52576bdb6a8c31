import pytest
import torch

from engine.kernels import paged_attention as module
from engine.kernels.paged_attention import paged_attention, paged_attention_reference
from engine.kernels.prefill_attention import LONG, can_take, prefill_attention_gluon

from .compare import assert_close
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
    "many heads a group": {"lengths": [256, 9], "queries": [40, 9], "heads": 32, "kv_heads": 1, "dim": 64},
}


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if device.type == "cpu" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernel is for Hopper GPUs, and Gluon has no interpreter")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [8, 16, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(hopper, dtype, case, block_size):
    arguments, options, _ = problem(hopper, dtype, **CASES[case], block_size=block_size, padding=3)
    out = torch.full(arguments[0].shape, torch.nan, dtype=dtype, device=hopper)
    live = int(arguments[4][-1])
    assert can_take(*arguments[:2])
    found = prefill_attention_gluon(*arguments, **options, out=out)
    assert found[live:].isnan().all(), "padding rows were touched"
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    assert_close(found[:live], paged_attention_reference(*wide, **options)[:live])


@pytest.mark.gpu
def test_the_same_prompt_gives_the_same_bits(hopper):
    """Warps work side by side: one that read what another had not fetched yet would show now and then."""
    sizes = {"lengths": [2500], "queries": [2100], "heads": 16, "kv_heads": 4, "dim": 128}
    arguments, options, _ = problem(hopper, torch.bfloat16, **sizes, block_size=16)
    first = prefill_attention_gluon(*arguments, **options)
    for _ in range(50):
        assert torch.equal(prefill_attention_gluon(*arguments, **options), first)


@pytest.mark.parametrize(
    ("longest", "options", "wanted"),
    [
        (LONG + 1, {}, "prefill"),
        (LONG, {}, "paged"),
        (LONG + 1, {"window": 9}, "paged"),
        (LONG + 1, {"softcap": 9.0}, "paged"),
    ],
)
def test_long_prompts_take_it(monkeypatch, longest, options, wanted):
    taken = []
    monkeypatch.setattr(module, "use_triton", lambda _: True)
    monkeypatch.setattr(module, "can_take", lambda *_: True)
    monkeypatch.setattr(module, "prefill_attention_gluon", lambda *_, **__: taken.append("prefill"))
    monkeypatch.setattr(module, "paged_attention_triton", lambda *_, **__: taken.append("paged"))
    paged_attention(*[torch.zeros(1)] * 6, scale=1.0, max_query_len=longest, **options)
    assert taken == [wanted]


def test_only_what_a_gpu_of_the_kind_has(monkeypatch):
    q, cache = torch.zeros(4, 4, 128, dtype=torch.bfloat16), torch.zeros(2, 2, 16, 128, dtype=torch.bfloat16)
    assert not can_take(q, cache)
    monkeypatch.setattr("engine.kernels.prefill_attention.use_triton", lambda _: True)
    monkeypatch.setattr("engine.kernels.prefill_attention.nvidia_capability", lambda _: (9, 0))
    assert can_take(q, cache)
    assert not can_take(q.float(), cache.float())
    assert not can_take(q[..., :96], cache[..., :96])
    assert not can_take(q, cache[:, :, :4])
