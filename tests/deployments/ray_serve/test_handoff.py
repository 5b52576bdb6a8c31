"""Arrays and updates on their way between deployments."""

import asyncio
import weakref

import numpy as np
import pytest

from deployments.ray_serve.handoff import ObjectStore
from deployments.ray_serve.packing import pack, unpack
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage
from tests.serving import wait_until


class Reference:
    """Stands for a reference to an object."""


@pytest.mark.parametrize(("seconds", "kept"), [(60.0, True), (0.0, False)])
async def test_the_maker_of_an_array_keeps_its_reference_for_a_while(seconds, kept):
    """A receiver that is slow to count the reference inside a result as its own would find nothing."""
    store = ObjectStore(lambda array: Reference(), seconds)
    reference = weakref.ref(await store.put(np.zeros(3)))
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, later.set)
    await asyncio.wait_for(later.wait(), 60)
    assert (reference() is not None) == kept


async def test_an_argument_of_a_call_is_kept_by_ray_alone():
    store = ObjectStore(lambda array: Reference(), 60.0)
    reference = weakref.ref(await store.passed(np.zeros((1 << 20) + 1, np.uint8)))
    # The future of the thread ends a moment later.
    await wait_until(lambda: reference() is None, 10)


@pytest.mark.parametrize(
    "update",
    [
        StreamUpdate("a", [OutputDelta(0, " wörd", [17])], Usage(30, 5, 16)),
        StreamUpdate(
            "b",
            [
                OutputDelta(1, "", [4], [{4: TokenLogprob(-0.5, 1, "x")}], "stop", "END"),
                OutputDelta(0, "y", [5, 6]),
            ],
            Usage(1, 2),
            [None, {3: TokenLogprob(-1.0, 2)}],
            finished=True,
        ),
    ],
)
def test_an_update_arrives_as_it_was_sent(update):
    assert unpack(pack(update)) == update
