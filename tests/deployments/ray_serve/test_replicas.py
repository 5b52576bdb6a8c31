"""Replicas: requests wait for their streams, and refusals are returned."""

import asyncio

import numpy as np
import pytest

from deployments.ray_serve.failures import Misrouted, Refusal, answered, checked
from deployments.ray_serve.replicas import Held, HeldRequests
from deployments.stages import Generation
from engine.errors import InvalidRequest
from engine.prompt import EmbeddedMedia, EngineInput
from engine.sampling_params import SamplingParams

HELD = Held(
    Generation("one", EngineInput([1]), SamplingParams()),
    [EmbeddedMedia("h", np.zeros((2, 3), np.float32), "float32")],
)


async def test_held_requests_are_taken_once():
    held = HeldRequests()
    held.keep(HELD)
    assert held.take("one") is HELD and len(held) == 0
    for name in ("one", "other"):
        with pytest.raises(Misrouted):
            held.take(name)


async def test_held_requests_are_dropped_after_a_while():
    held = HeldRequests(0.0)
    held.keep(HELD)
    assert len(held) == 1
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, later.set)
    await asyncio.wait_for(later.wait(), 60)
    assert len(held) == 0


async def test_a_refusal_is_a_result_and_a_bug_is_raised():
    async def work(error):
        raise error

    refusal = await answered(work(InvalidRequest("no", param="a")))
    assert isinstance(refusal, Refusal)
    with pytest.raises(InvalidRequest) as caught:
        checked(refusal)
    assert caught.value.param == "a"
    with pytest.raises(ZeroDivisionError):
        await answered(work(ZeroDivisionError()))
