"""Mailboxes: what a relay takes past the reader, and what it leaves."""

import asyncio

import pytest

from engine.errors import Unavailable
from engine.mailbox import Mailbox, Relay
from engine.outputs import FinishReason, OutputDelta, StreamUpdate, Usage


def update(text: str, *, ends: FinishReason | None = None, finished: bool = False) -> StreamUpdate:
    return StreamUpdate("one", [OutputDelta(0, text, [1], None, ends)], Usage(), finished=finished)


async def test_a_relay_takes_what_is_in_the_middle_of_a_stream():
    relay, taken = Relay(), []
    mailbox = Mailbox(relay)
    mailbox.put(update("a"))
    relay.to = taken.append
    # The first still waits for the reader, so the second must not overtake it.
    mailbox.put(update("b"))
    assert not taken and (await mailbox.get()).deltas[0].text == "ab"
    mailbox.put(update("c"))
    assert [each.deltas[0].text for each in taken] == ["c"]
    for last in (update("d", ends="stop"), update("e", finished=True)):
        mailbox.put(last)
        assert len(taken) == 1 and await asyncio.wait_for(mailbox.get(), 60) is last


async def test_what_a_relay_raises_is_for_the_reader():
    def gone(_: StreamUpdate) -> None:
        raise Unavailable("gone")

    relay = Relay()
    relay.to = gone
    mailbox = Mailbox(relay)
    mailbox.put(update("a"))
    with pytest.raises(Unavailable, match="gone"):
        await asyncio.wait_for(mailbox.get(), 60)


async def test_of_several_errors_the_first_is_told():
    """What comes after it follows from it, such as that the engine stops."""
    mailbox = Mailbox()
    mailbox.put(update("a"))
    for words in ("the cause", "a consequence"):
        mailbox.fail(Unavailable(words))
    assert (await asyncio.wait_for(mailbox.get(), 60)).deltas[0].text == "a"
    with pytest.raises(Unavailable, match="the cause"):
        await asyncio.wait_for(mailbox.get(), 60)
