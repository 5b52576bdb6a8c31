"""Responses of events end with their client, however the server learns that it has left."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect

from deployments import sse
from deployments.report import NewIds, SentResponse, begin_report

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Streamed:
    """A response whose events never end, and messages that the server was sent of it.

    Attributes:
        begun: the first event was sent.
        left: the client has left.
        closed: the events were closed.
    """

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.begun, self.left = asyncio.Event(), asyncio.Event()
        self.closed = False
        self.response = sse.EventResponse(self._events(), sse.error_event, sse.DONE)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            await asyncio.Future()
        finally:
            self.closed = True

    async def _send(self, message: dict) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.begun.set()

    async def run(self, receive, send=None) -> None:
        report = begin_report(SCOPE, NewIds())
        report.response = SentResponse(send or self._send, ())
        await self.response(SCOPE, receive, report.response)


async def never() -> dict:
    return await asyncio.Future()


async def test_a_client_that_leaves_ends_the_response_without_an_error():
    streamed = Streamed()
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}]

    async def receive() -> dict:
        if len(messages) == 1:
            await streamed.left.wait()
        return messages.pop(0)

    task = asyncio.ensure_future(streamed.run(receive))
    await streamed.begun.wait()
    assert not task.done() and not streamed.closed
    streamed.left.set()
    await task
    assert streamed.closed and not task.cancelling()
    # The end of the response is not sent: nobody would read it.
    assert [message.get("body") for message in streamed.sent] == [None, b"data: 1\n\n"]


async def test_a_connection_that_cannot_be_read_has_no_client():
    streamed = Streamed()

    async def receive() -> dict:
        raise ConnectionError("broken")

    await asyncio.wait_for(streamed.run(receive), 60)
    assert streamed.closed


async def test_a_response_that_the_server_cancels_stays_cancelled():
    streamed = Streamed()
    task = asyncio.ensure_future(streamed.run(never))
    await streamed.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert streamed.closed


async def test_a_connection_that_takes_no_more_is_a_client_that_has_left():
    streamed = Streamed()

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            raise OSError("closed")

    with pytest.raises(ClientDisconnect):
        await streamed.run(never, send)
    assert streamed.closed
