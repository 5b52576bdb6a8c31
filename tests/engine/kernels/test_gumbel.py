"""Sampling kernels against their torch references, and the noise against its distribution."""

import pytest
import torch
from scipy import stats

from engine.kernels.gumbel import (
    argmax,
    argmax_triton,
    exponential_noise,
    gumbel_argmax_reference,
    gumbel_argmax_triton,
)
from engine.kernels.truncation import truncation_threshold_reference, truncation_threshold_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_rows(rows, vocab, dtype, seed=0):
    """Return logits that are part of a wider tensor, whose other elements would win, and the rows'
    parameters."""
    torch.manual_seed(seed)
    wide = torch.full((rows, vocab + 9), 1e4, dtype=dtype)
    wide[:, :vocab] = (torch.randn(rows, vocab) * 3).to(dtype)
    wide[:, 1] = float("-inf")
    temperature = torch.rand(rows) * 2 + 0.3
    temperature[::4] = 0
    # Columns of tables, as in the sampler.
    floats = torch.stack([temperature, torch.rand(rows) * 0.9 + 0.1, torch.rand(rows) * 0.2], dim=1)
    floats[1::3, 1] = 1.0
    floats[2::3, 2] = 0.0
    ints = torch.stack(
        [
            torch.randint(-(2**62), 2**62, (rows,)),
            torch.randint(0, 2**20, (rows,)),
            torch.randint(0, 40, (rows,)) * torch.randint(0, 2, (rows,)),
        ],
        dim=1,
    )
    return wide.to(DEVICE)[:, :vocab], floats.to(DEVICE), ints.to(DEVICE)


SHAPES = [(1, 7), (3, 1000), (2, 5000), (13, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truncated", [False, True])
def test_tokens_equal_the_reference(shape, dtype, truncated):
    logits, floats, ints = random_rows(*shape, dtype)
    threshold = logits.float().quantile(0.8, dim=1) if truncated else None
    arguments = (logits, floats[:, 0], ints[:, 0], ints[:, 1], threshold)
    tokens = gumbel_argmax_triton(*arguments)
    assert tokens.tolist() == gumbel_argmax_reference(*arguments).tolist()
    assert tokens[::4].tolist() == logits[::4].argmax(dim=1).tolist()
    assert argmax_triton(logits).tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_not_allowed_are_as_if_their_logits_were_minus_infinity(shape, dtype):
    rows, vocab = shape
    logits, floats, ints = random_rows(*shape, dtype, seed=2)
    bits = torch.rand(rows, -(-vocab // 32) * 32) < 0.2
    bits[-1] = rows == 1
    # The best token of the first row may not come; bits beyond the vocabulary mean nothing.
    bits[0, logits[0].argmax()] = False
    words = (bits.view(rows, -1, 32).long() << torch.arange(32)).sum(-1)
    # As columns of a wider tensor.
    words = torch.cat([words, torch.full_like(words, -1)], dim=1).int().to(DEVICE)[:, : words.shape[1]]
    masked = logits.float().masked_fill(~bits[:, :vocab].to(DEVICE), float("-inf"))
    given = floats[:, 0], ints[:, 0], ints[:, 1], masked.nan_to_num(neginf=-50.0).quantile(0.8, dim=1)
    wanted = gumbel_argmax_reference(masked, *given).tolist()
    assert gumbel_argmax_triton(logits, *given, words).tolist() == wanted
    assert gumbel_argmax_reference(logits, *given, words).tolist() == wanted
    likeliest = argmax(masked).tolist()
    assert argmax(logits, words).tolist() == argmax_triton(logits, words).tolist() == likeliest
    assert rows == 1 or (wanted[-1], likeliest[-1]) == (-1, -1)


@pytest.mark.parametrize("kernel", [gumbel_argmax_reference, gumbel_argmax_triton])
def test_ties_and_rows_of_minus_infinity(kernel):
    logits = torch.full((3, 3000), float("-inf"), device=DEVICE)
    logits[0, [17, 1500, 2999]] = 2.0
    temperature = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert kernel(logits, temperature, zeros, zeros).tolist() == [17, -1, -1]
    assert argmax(logits).tolist() == argmax_triton(logits).tolist() == [17, -1, -1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_keeps_the_same_tokens_as_the_reference(shape, dtype):
    logits, floats, ints = random_rows(*shape, dtype, seed=1)
    arguments = (logits, floats[:, 0], ints[:, 2], floats[:, 1], floats[:, 2])
    expected = logits.float() >= truncation_threshold_reference(*arguments)[:, None]
    kept = logits.float() >= truncation_threshold_triton(*arguments)[:, None]
    assert kept.tolist() == expected.tolist()
    assert kept.any(dim=1).all() and (shape[1] < 100 or not kept.all(dim=1).all())


@pytest.mark.parametrize("kernel", [truncation_threshold_reference, truncation_threshold_triton])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, 6),
        (1, 1.0, 0.0, 1),
        (2, 1.0, 0.0, 3),  # ties are kept together
        (100, 1.0, 0.0, 6),
        (0, 0.49, 0.0, 1),
        (0, 0.51, 0.0, 3),
        (0, 0.76, 0.0, 4),
        (3, 0.66, 0.0, 1),  # renormalised to two thirds
        (3, 0.67, 0.0, 3),
        (1, 1e-6, 0.0, 1),
        (0, 1.0, 0.24, 3),
        (0, 1.0, 0.26, 1),
        (0, 1.0, 1.0, 1),
    ],
)
def test_truncation_by_hand(kernel, top_k, top_p, min_p, kept):
    share = torch.tensor([0.125, 0.0, 0.5, 0.0625, 0.125, 0.1, 0.0875])
    logits = (share.log() * 2.0)[None].to(DEVICE)
    table = torch.tensor([[2.0, top_p, min_p]], device=DEVICE)
    k = torch.tensor([top_k], device=DEVICE)
    threshold = kernel(logits, table[:, 0], k, table[:, 1], table[:, 2])
    assert int(((logits >= threshold[:, None]) & ~logits.isinf()).sum()) == kept


def test_noise_is_exponential_and_independent():
    seeds = torch.cat([torch.arange(1, 41), torch.arange(1, 41) << 32])
    index = torch.arange(5)
    rows = torch.cartesian_prod(seeds, index)
    noise = exponential_noise(rows[:, 0], rows[:, 1], torch.arange(1000)).double()
    assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    # Races are won near zero, where a float32 uniform variable has few values.
    smallest = noise.view(200, -1).min(dim=1).values * noise.numel() / 200
    assert stats.kstest(smallest.numpy(), "expon").pvalue > 1e-3
    uniform = (-noise).exp() - 0.5
    for shifted in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(5, 0), uniform.roll(200, 0)):
        correlation = float((uniform * shifted).mean()) * 12
        assert abs(correlation) < 4 / noise.numel() ** 0.5
