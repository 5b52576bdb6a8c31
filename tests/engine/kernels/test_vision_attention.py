import pytest
import torch

from engine.kernels import image_attention
from engine.kernels.image_attention import image_attention_gluon
from engine.kernels.image_plan import ImagePlan, choose_plan, possible_plans
from engine.kernels.shares import part_counters
from engine.kernels.vision_attention import (
    choose_tile,
    head_parts,
    vision_attention_reference,
    vision_attention_triton,
)

from .compare import assert_close


@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 72, 80, 96])
@pytest.mark.parametrize("lengths", [[5], [64, 1, 70], [16, 0, 33, 16]])
def test_triton_equals_reference(device, dtype, dim, lengths):
    heads, tokens = 2, sum(lengths)
    fused = torch.randn(tokens, 3 * heads, dim, device=device, dtype=dtype)
    q, k, v = fused.split(heads, dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    options = {"max_len": max(lengths), "scale": dim**-0.5}
    result = vision_attention_triton(q, k, v, bounds, **options)
    expected = vision_attention_reference(q.double(), k.double(), v.double(), bounds, **options)
    assert_close(result, expected)


SHARES, TWO, THREE = ImagePlan(shares=True), ImagePlan(), ImagePlan(groups=3)


class Images:
    """Images of ``lengths`` with 16 heads on a GPU; tokens behind them are NaN."""

    def __init__(self, device, dtype, dim, lengths):
        self.tokens = sum(lengths)
        fused = torch.randn(self.tokens + 3, 48, dim, device=device, dtype=dtype)
        self.q, self.k, self.v = fused.split(16, dim=1)
        for x in (self.q, self.k, self.v):
            x[self.tokens :] = torch.nan
        assert image_attention.supports(self.q, self.k, self.v)
        self.bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.options = {"max_len": max(lengths), "scale": dim**-0.5}
        self.counters = part_counters(device)

    def run(self, plan):
        options = {"scale": self.options["scale"], "counters": self.counters, "plan": plan}
        return image_attention_gluon(self.q, self.k, self.v, self.bounds, **options)[: self.tokens]

    def check(self, plan):
        """Compare with the reference, and with later runs: a read of what another program has not written yet
        would show now and then."""
        result = self.run(plan)
        for head in range(16):
            one = [x[: self.tokens, head : head + 1].double() for x in (self.q, self.k, self.v)]
            expected = vision_attention_reference(*one, self.bounds, **self.options)
            assert_close(result[:, head : head + 1], expected)
        assert all(torch.equal(self.run(plan), result) for _ in range(20))
        assert not self.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("length", [5, 196, 1600, 2500])
def test_shares_of_one_image_equal_the_reference(hopper, dtype, dim, length):
    """Tokens beyond the segment, and programs without a share, change nothing."""
    Images(hopper, dtype, dim, [length]).check(SHARES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "plan"), [(80, TWO), (128, TWO), (80, THREE)])
@pytest.mark.parametrize("lengths", [[5], [1, 0, 63, 700, 129, 1600, 3, 0], [128] * 40, [1600] * 4])
def test_whole_tiles_of_images_equal_the_reference(hopper, dtype, dim, plan, lengths):
    """Programs pass over images without tokens, and may have none, one or several tiles."""
    Images(hopper, dtype, dim, lengths).check(plan)


def test_only_heads_beside_each_other_are_supported(monkeypatch):
    monkeypatch.setattr(image_attention, "is_hopper", lambda _: True)
    q, k, v = torch.zeros(9, 6, 80, dtype=torch.bfloat16).split(2, dim=1)
    assert image_attention.supports(q, k, v)
    assert not image_attention.supports(q[..., :72], k[..., :72], v[..., :72])
    assert not image_attention.supports(q[..., :64], k[..., :64], v[..., :64])
    assert not image_attention.supports(*(x.float() for x in (q, k, v)))


def test_heads_are_cut_in_two_where_padding_costs_more():
    parts = {dim: head_parts(dim) for dim in (8, 16, 24, 64, 72, 80, 96, 112, 128)}
    cut = {72: (64, 16), 80: (64, 16), 96: (64, 32)}
    assert parts == {8: (16, 0), 16: (16, 0), 24: (32, 0), 64: (64, 0), 112: (128, 0), 128: (128, 0), **cut}


@pytest.mark.parametrize(
    ("length", "segments", "rows"), [(64, 1, 64), (1444, 1, 64), (1600, 1, 128), (784, 2, 128), (1600, 2, 64)]
)
def test_tiles_are_large_where_small_ones_need_a_second_wave(length, segments, rows):
    assert choose_tile(80, length, 16 * segments, 2, sms=132).rows == rows


@pytest.mark.parametrize(
    ("tokens", "segments", "dim", "expected"),
    [
        # Read on an H200: the fastest plan for 16 heads and 132 SMs, or the general kernel.
        (576, 1, 80, None),
        (1024, 1, 80, TWO),
        (1444, 1, 80, THREE),
        (1156, 1, 80, THREE),
        (1600, 1, 80, TWO),
        (2048, 1, 80, TWO),
        (2304, 1, 80, SHARES),
        (3136, 1, 80, SHARES),
        (4096, 1, 80, TWO),
        (6400, 1, 80, SHARES),
        (4 * 1600, 4, 80, TWO),
        (16 * 784, 16, 80, THREE),
        (4 * 784, 4, 80, None),
        (16 * 1024, 16, 80, TWO),
        (16 * 1600, 16, 64, None),
        (4 * 1024, 4, 128, TWO),
        (64 * 64, 64, 80, None),
    ],
)
def test_the_kernel_of_images_is_the_fastest_one(tokens, segments, dim, expected):
    assert choose_plan(tokens, segments, 16, dim, sms=132, counted=True) == expected


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("segments", [1, 2, 16])
@pytest.mark.parametrize("counted", [False, True])
def test_all_possible_plans_are_chosen_and_no_other(dim, segments, counted):
    """At start-up the kernels of the possible plans are compiled."""
    lengths = range(1, 8000, 37)
    chosen = {choose_plan(segments * n, segments, 16, dim, sms=132, counted=counted) for n in lengths}
    assert chosen == {None, *possible_plans(dim, segments, counted=counted)}


def test_segments_do_not_see_each_other(device):
    q, k, v = torch.randn(3, 20, 1, 16, device=device)
    bounds = torch.tensor([0, 12, 20], dtype=torch.int32, device=device)
    before = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    k[12:], v[12:] = 9.0, -9.0
    after = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12:], after[12:])
