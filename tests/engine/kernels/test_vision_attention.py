import pytest
import torch

from engine.kernels import image_attention
from engine.kernels.image_attention import choose_shares, image_attention_gluon
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("length", [5, 196, 1600, 2500])
def test_shares_of_one_image_equal_the_reference(hopper, dtype, dim, length):
    """Tokens beyond the segment, and programs without a share, change nothing."""
    q, k, v = torch.randn(length + 3, 48, dim, device=hopper, dtype=dtype).split(16, dim=1)
    for x in (q, k, v):
        x[length:] = torch.nan
    bounds, counters = torch.tensor([0, length], dtype=torch.int32, device=hopper), part_counters(hopper)
    assert image_attention.supports(q, k, v)
    options = {"scale": dim**-0.5, "counters": counters}
    result = image_attention_gluon(q, k, v, bounds, **options)
    expected = torch.empty_like(result[:length], dtype=torch.float64)
    for head in range(16):
        one = [x[:length, head : head + 1].double() for x in (q, k, v)]
        expected[:, head : head + 1] = vision_attention_reference(
            *one, bounds, max_len=length, scale=dim**-0.5
        )
    assert_close(result[:length], expected)
    # Programs merge each other's parts: a read of what is not written yet would show now and then.
    for _ in range(20):
        assert torch.equal(image_attention_gluon(q, k, v, bounds, **options)[:length], result[:length])
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("lengths", [[5], [1, 0, 63, 700, 129, 1600, 3, 0], [128] * 40])
def test_whole_tiles_of_images_equal_the_reference(hopper, dtype, dim, lengths):
    """Programs pass over images without tokens, and may have none, one or several tiles."""
    tokens = sum(lengths)
    q, k, v = torch.randn(tokens + 3, 48, dim, device=hopper, dtype=dtype).split(16, dim=1)
    for x in (q, k, v):
        x[tokens:] = torch.nan
    bounds = torch.tensor([0, *lengths], device=hopper).cumsum(0).int()
    result = image_attention_gluon(q, k, v, bounds, scale=dim**-0.5)
    options = {"max_len": max(lengths), "scale": dim**-0.5}
    wide = (x[:tokens].double() for x in (q, k, v))
    assert_close(result[:tokens], vision_attention_reference(*wide, bounds, **options))
    for _ in range(20):
        assert torch.equal(image_attention_gluon(q, k, v, bounds, scale=dim**-0.5)[:tokens], result[:tokens])


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
    ("tokens", "segments", "dim", "shares"),
    [
        # Read on an H200: the fastest of three kernels for 16 heads and 132 SMs.
        (576, 1, 80, None),
        (1024, 1, 80, False),
        (1444, 1, 80, None),
        (1600, 1, 80, False),
        (2048, 1, 80, False),
        (2304, 1, 80, True),
        (3136, 1, 80, True),
        (2 * 1600, 2, 80, False),
        (4 * 784, 4, 80, None),
        (16 * 1024, 16, 80, False),
        (16 * 1600, 16, 64, None),
        (4 * 1024, 4, 128, False),
        (64 * 64, 64, 80, None),
    ],
)
def test_the_kernel_of_images_is_the_fastest_one(tokens, segments, dim, shares):
    assert choose_shares(tokens, segments, 16, dim, sms=132) is shares


def test_segments_do_not_see_each_other(device):
    q, k, v = torch.randn(3, 20, 1, 16, device=device)
    bounds = torch.tensor([0, 12, 20], dtype=torch.int32, device=device)
    before = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    k[12:], v[12:] = 9.0, -9.0
    after = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12:], after[12:])
