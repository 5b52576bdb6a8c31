"""Responses of events end with their client, however the server learns that it has left. Events that are sent
past the response's task keep their order, and their errors are the response's."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from deployments import sse
from deployments.report import NewIds, SentResponse, begin_report
from engine.outputs import OutputDelta, StreamUpdate, Usage

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


class Relayed:
    """A response whose events come past its task, but for those that are put into ``queue``; None ends it.

    Attributes:
        sent: bodies that the server was sent.
        writable: set while the client reads.
        waits, taken, written: released when the response waits for an event, takes one, and when a body was
            written.
        aborted: how often the connection was broken off.
    """

    def __init__(self, error: Exception | None = None, patience_s: float | None = None) -> None:
        self._patience_s, self.aborted = patience_s, 0
        self.sent: list[bytes] = []
        self.queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.waits, self.taken, self.written = (asyncio.Semaphore(0) for _ in range(3))
        self.writable, self._error = asyncio.Event(), error
        self.writable.set()
        self.relay = sse.EventRelay()
        self.relay.event = lambda update: update.deltas[0].text.encode() if update.deltas else None
        self._response = sse.EventResponse(self._events(), sse.error_event, sse.DONE, self.relay)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        while True:
            self.waits.release()
            event = await self.queue.get()
            self.taken.release()
            if isinstance(event, Exception):
                raise event
            if event is None:
                return
            yield event

    async def _send(self, message: dict) -> None:
        # As uvicorn does: it waits before it writes.
        await self.writable.wait()
        if self._error is not None and message.get("body") == b"broken":
            raise self._error
        if message.get("body"):
            self.sent.append(message["body"])
            self.written.release()

    def _abort(self) -> None:
        self.aborted += 1

    async def run(self) -> None:
        self.report = begin_report(SCOPE, NewIds())
        self.report.response = SentResponse(self._send, (), abort=self._abort)
        self.report.response.patience_s = self._patience_s
        await self._response(SCOPE, never, self.report.response)

    def takes(self, text: str) -> bool:
        return self.relay.takes(StreamUpdate("one", [OutputDelta(0, text, [1])], Usage()))


async def test_events_that_are_relayed_are_sent_at_once_and_in_order():
    relayed = Relayed()
    assert not relayed.takes("too early")
    task = asyncio.ensure_future(relayed.run())
    await relayed.waits.acquire()
    assert relayed.takes("1") and relayed.takes("") and relayed.takes("2")
    assert relayed.sent == [b"1", b"2"]
    assert not relayed.relay.takes(StreamUpdate("one", [], Usage()))
    relayed.queue.put_nowait(b"3")
    await relayed.waits.acquire()
    assert relayed.takes("4")
    relayed.queue.put_nowait(None)
    await task
    assert relayed.sent == [b"1", b"2", b"3", b"4", sse.DONE]
    assert not relayed.takes("too late")


@pytest.mark.parametrize("last", [b"2", ValueError("lost")], ids=["an event", "a failure"])
async def test_what_follows_waits_for_a_client_that_reads_slowly(last):
    relayed = Relayed()
    task = asyncio.ensure_future(relayed.run())
    await relayed.waits.acquire()
    relayed.writable.clear()
    failed = isinstance(last, Exception)
    # Taken, but not written yet: what follows is for the reader.
    assert relayed.takes("1") and not relayed.takes("2")
    relayed.queue.put_nowait(last)
    await relayed.taken.acquire()
    assert relayed.sent == []
    relayed.writable.set()
    relayed.queue.put_nowait(None)
    await task
    first, rest = relayed.sent[0], b"".join(relayed.sent[1:])
    assert first == b"1" and rest.endswith(sse.DONE) and rest.count(b"\n\n") == (2 if failed else 1)
    assert b'"internal_error"' in rest if failed else rest == b"2" + sse.DONE


async def test_a_relayed_event_is_written_as_soon_as_the_client_reads():
    """Although nothing follows it."""
    relayed = Relayed()
    task = asyncio.ensure_future(relayed.run())
    await relayed.waits.acquire()
    relayed.writable.clear()
    assert relayed.takes("1")
    relayed.writable.set()
    await relayed.written.acquire()
    relayed.writable.clear()
    assert not relayed.takes("2")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("step", ["start", "relayed", "taken", "last"])
async def test_a_client_that_does_not_read_ends_the_response(step):
    """Wherever the event is that it doesn't take. A connection that were only closed would wait for it."""
    relayed = Relayed(patience_s=0.02)
    if step == "start":
        # It has not read the response before, which came by the same connection.
        relayed.writable.clear()
    task = asyncio.ensure_future(relayed.run())
    if step != "start":
        await relayed.waits.acquire()
        relayed.writable.clear()
    if step == "relayed":
        assert relayed.takes("1")
    relayed.queue.put_nowait(None if step == "last" else b"2")
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(task, 60)
    assert relayed.report.stalled and relayed.sent == [] and relayed.aborted == 1


@pytest.mark.parametrize("step", ["relayed", "taken", "last"])
async def test_patience_with_a_client_that_reads_slowly_is_for_each_part_of_an_event(step, monkeypatch):
    relayed, long = Relayed(patience_s=60), "abcdefg" * 30_000
    begun: list[float | None] = []

    def noted(seconds: float | None) -> asyncio.Timeout:
        begun.append(seconds)
        return asyncio.timeout(seconds)

    async def send(message: dict) -> None:
        if data := message.get("body"):
            await asyncio.sleep(0)
            relayed.sent.append(data)

    relayed._send = send  # type: ignore[method-assign]
    task = asyncio.ensure_future(relayed.run())
    await relayed.waits.acquire()
    monkeypatch.setattr("deployments.leaving.asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": noted}))
    if step == "relayed":
        assert relayed.takes(long)
    else:
        relayed.queue.put_nowait(long.encode() if step == "taken" else sse.Closing(long.encode()))
    relayed.queue.put_nowait(None)
    await task
    assert b"".join(relayed.sent) == long.encode() + sse.DONE
    assert begun == [60] * len(relayed.sent) and max(map(len, relayed.sent)) == 1 << 16


async def test_a_relayed_event_that_waits_ends_with_its_response():
    relayed = Relayed()
    task = asyncio.ensure_future(relayed.run())
    await relayed.waits.acquire()
    relayed.writable.clear()
    assert relayed.takes("1")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    relayed.writable.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert relayed.sent == []


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "later"])
async def test_a_relayed_event_that_cannot_be_sent_ends_the_response(slow):
    for error, raised in ((OSError("closed"), ClientDisconnect), (ValueError("a fault"), None)):
        relayed = Relayed(error)
        task = asyncio.ensure_future(relayed.run())
        await relayed.waits.acquire()
        if slow:
            relayed.writable.clear()
            assert relayed.takes("broken")
            relayed.writable.set()
        else:
            assert not relayed.takes("broken")
        # The mailbox wakes the reader for an update that was not taken.
        relayed.queue.put_nowait(b"broken, too")
        if raised is None:
            await task
            sent = b"".join(relayed.sent)
            assert b'"internal_error"' in sent and sent.endswith(sse.DONE) and b"broken" not in sent
        else:
            with pytest.raises(raised):
                await task
            assert relayed.sent == []
