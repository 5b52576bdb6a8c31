"""Compares whether two outputs are the same in all they carry; log-probabilities within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.outputs import RequestOutput, TokenLogprob

Logprobs = Sequence[dict[int, TokenLogprob] | None]


def assert_same_output(found: RequestOutput, wanted: RequestOutput) -> None:
    """All fields but the request's id and what came from the prefix cache."""
    assert_same_logprobs(found.prompt_logprobs, wanted.prompt_logprobs)
    for ours, theirs in zip(found.outputs, wanted.outputs, strict=True):
        assert_same_logprobs(ours.logprobs, theirs.logprobs)
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
    assert _plain(found) == _plain(wanted)


def assert_same_logprobs(found: Logprobs | None, wanted: Logprobs | None) -> None:
    """Tokens, their order, ranks and texts exactly."""
    assert (found is None) == (wanted is None)
    for ours, theirs in zip(found or (), wanted or (), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert list(ours) == list(theirs)
            for token, entry in theirs.items():
                assert ours[token].logprob == pytest.approx(entry.logprob, abs=1e-4)
                assert replace(ours[token], logprob=0.0) == replace(entry, logprob=0.0)


def _plain(output: RequestOutput) -> RequestOutput:
    return replace(
        output,
        request_id="",
        prompt_logprobs=None,
        outputs=[replace(o, logprobs=None, cumulative_logprob=None) for o in output.outputs],
        usage=replace(output.usage, cached_tokens=0),
    )
