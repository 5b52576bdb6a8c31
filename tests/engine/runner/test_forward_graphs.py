from itertools import pairwise

import pytest

from engine.runner.forward_graphs import COARSE_STEP, FINE_TOKENS, MAX_TOKENS, TOKEN_STEP, captured_sizes

SMALL, LARGE = 47_000_000, 233_000_000


@pytest.mark.parametrize(
    ("parameters", "most"), [(70_000_000, 3072), (LARGE, FINE_TOKENS), (SMALL, MAX_TOKENS)]
)
def test_long_passes_are_captured_where_launching_takes_longer(parameters, most):
    sizes = captured_sizes(parameters, 8192)
    assert sizes[0] == TOKEN_STEP // 4 and sizes[-1] == most
    assert {TOKEN_STEP // 2, TOKEN_STEP, 3 * TOKEN_STEP // 2, 7 * TOKEN_STEP // 2} <= set(sizes)
    assert all(
        last < size <= last + (TOKEN_STEP if last < FINE_TOKENS else COARSE_STEP)
        for last, size in pairwise(sizes)
    )


@pytest.mark.parametrize(
    ("max_tokens", "most"), [(1, 16), (64, 64), (65, 96), (1024, 1024), (1025, 1280), (2048, 2048)]
)
def test_none_that_no_step_fills(max_tokens, most):
    assert captured_sizes(SMALL, max_tokens)[-1] == most
