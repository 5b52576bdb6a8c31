import pytest
import torch

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


def test_heads_are_cut_in_two_where_padding_costs_more():
    parts = {dim: head_parts(dim) for dim in (8, 16, 24, 64, 72, 80, 96, 112, 128)}
    cut = {72: (64, 16), 80: (64, 16), 96: (64, 32)}
    assert parts == {8: (16, 0), 16: (16, 0), 24: (32, 0), 64: (64, 0), 112: (128, 0), 128: (128, 0), **cut}


@pytest.mark.parametrize(
    ("length", "segments", "rows"), [(64, 1, 64), (1444, 1, 64), (1600, 1, 128), (784, 2, 128), (1600, 2, 64)]
)
def test_tiles_are_large_where_small_ones_need_a_second_wave(length, segments, rows):
    assert choose_tile(80, length, 16 * segments, 2, sms=132).rows == rows


def test_segments_do_not_see_each_other(device):
    q, k, v = torch.randn(3, 20, 1, 16, device=device)
    bounds = torch.tensor([0, 12, 20], dtype=torch.int32, device=device)
    before = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    k[12:], v[12:] = 9.0, -9.0
    after = vision_attention_triton(q, k, v, bounds, max_len=12, scale=0.25)
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12:], after[12:])
