"""Arrays and updates on their way between deployments."""

import asyncio
import weakref

import numpy as np
import pytest

from deployments import handoff
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage


class Reference:
    """Stands for a reference to an object."""


def test_the_maker_holds_on_to_an_array_for_a_while(monkeypatch):
    """A receiver that is slow to count the reference inside a result as its own would find nothing."""
    monkeypatch.setattr(handoff.ray, "put", lambda array: Reference())

    async def kept(seconds: float) -> bool:
        monkeypatch.setattr(handoff, "KEEP_S", seconds)
        reference = weakref.ref(await handoff.put(np.zeros(3)))
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.001, later.set)
        await asyncio.wait_for(later.wait(), 10)
        return reference() is not None

    assert asyncio.run(kept(60.0))
    assert not asyncio.run(kept(0.0))


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
    assert handoff.unpack(handoff.pack(update)) == update
