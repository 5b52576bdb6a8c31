"""Server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.errors import as_sightline, error_body
from deployments.leaving import ENDS, Begun, ClientStalled, WhileListenedTo, rest_within, sent_within
from deployments.report import SentResponse, current_report
from engine.errors import SightlineError
from engine.outputs import StreamUpdate

DONE = b"data: [DONE]\n\n"

#: No proxy may collect events before it passes them on.
_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)

#: ``json.dumps`` would make one for each call.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Closing(bytes):
    """Events behind which nothing comes but others of this class and the response's end, or an error: all are
    sent together."""


class EventResponse(StreamingResponse):
    """A response of events.

    When a client goes away, Starlette leaves the other events to the garbage collector. Until then the engine
    would hold the request's memory, so this response closes them.

    Args:
        events: the events; closed when the response ends, in whatever way.
        failed: makes the last event of a stream that fails.
        end: sent after all events, after a failure as well.
        relay: sends some events past ``events``; None: there is none.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[SightlineError], bytes],
        end: bytes = b"",
        relay: "EventRelay | None" = None,
    ) -> None:
        # Without Starlette's own way, which encodes the same headers for each response.
        self.status_code, self.background = 200, None
        self.raw_headers = list(_HEADERS)
        self._events, self._failed, self._end = events, failed, end
        self._relay = relay or EventRelay()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            if (client := scope.get(ENDS)) is not None:
                await self._stream(send, client)
                return
            async with WhileListenedTo(receive) as client:
                client.listen()
                await self._stream(send, client)

    async def _stream(self, send: Send, client: WhileListenedTo) -> None:
        """Send the events to their end. Nothing stands between an event and the server, since most hold one
        token. ``client`` is listened to until then."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        report = current_report()
        response = report.response
        assert response is not None, "every HTTP request has one"
        closing, end = b"", self._end
        try:
            while (each := await self._relay.next(self._events, response)) is not None:
                if type(each) is Closing:
                    closing += each
                else:
                    await _parts_sent(_parts(each), response)
        except ClientStalled:
            client.stop()
            response.give_up()
            raise ClientDisconnect from None
        except OSError:
            # Nothing can be sent any more.
            raise ClientDisconnect from None
        except Exception as error:
            reported = as_sightline(error)
            # The request's line in the log will name it.
            report.error = reported
            end = self._failed(reported) + end
        client.stop()
        try:
            *parts, last = _parts(closing + end)
            await _parts_sent(parts, response)
            await sent_within(response.patience_s, response.body(last, more=False))
        except ClientStalled:
            response.give_up()
            raise ClientDisconnect from None


class EventRelay:
    """Sends events of updates while nothing else is to be sent. It wakes no task: a token costs half as much.
    A :class:`~engine.mailbox.Taker`.

    Attributes:
        event: makes the event of an update: empty if there is nothing to send, None if it is for the reader.
            None: all updates are.
    """

    __slots__ = ("_error", "_response", "_rest", "event")

    def __init__(self) -> None:
        self.event: Callable[[StreamUpdate], bytes | None] | None = None
        self._response: SentResponse | None = None
        self._rest: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    async def next(self, events: AsyncGenerator[bytes, None], response: SentResponse) -> bytes | None:
        """The next one of ``events``; None after the last. Until it is there, this object sends events of its
        own. They are sent when this method returns, or raises an error of ``events``.

        Raises:
            Exception: one could not be sent.
        """
        self._response = response
        try:
            found = await anext(events, None)
        except asyncio.CancelledError:
            self._response = None
            if self._rest is not None:
                self._rest.cancel()
            raise
        except Exception:
            await self._sent()
            raise
        await self._sent()
        return found

    async def _sent(self) -> None:
        self._response = None
        if self._rest is not None:
            await self._rest
            self._rest = None
        if self._error is not None:
            raise self._error

    def takes(self, update: StreamUpdate) -> bool:
        """See :class:`~engine.mailbox.Taker`."""
        if self._response is None or self.event is None:
            return False
        try:
            if (event := self.event(update)) is None:
                return False
            if event:
                self._send(event, self._response)
        except Exception as error:
            # For the reader, whom the update wakes.
            self._response, self._error = None, error
            return False
        return True

    def _send(self, event: bytes, response: SentResponse) -> None:
        rest: Coroutine[Any, Any, None]
        if len(event) > _PART_BYTES:
            rest = _parts_sent(_parts(event), response)
        else:
            sending = response.body(event).__await__()
            try:
                waits_for = next(sending)
            except StopIteration:
                return
            rest = rest_within(response.patience_s, Begun(sending, waits_for))
        # The client reads slowly, or has much to read. Updates wait for the reader meanwhile: it merges them.
        self._response = None
        self._rest = asyncio.ensure_future(rest)


#: The most bytes that are given to a connection at once. The server's patience with a client is for each.
_PART_BYTES = 64 << 10


def _parts(data: bytes) -> Sequence[bytes]:
    """``data`` in parts, at least one."""
    if len(data) <= _PART_BYTES:
        return (data,)
    return [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]


async def _parts_sent(parts: Sequence[bytes], response: SentResponse) -> None:
    """Send parts of a body that are not the last.

    Raises:
        ClientStalled: the client doesn't read.
    """
    for part in parts:
        await sent_within(response.patience_s, response.body(part))


def event(data: BaseModel) -> bytes:
    """One event."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def around_choices(data: BaseModel) -> tuple[bytes, bytes]:
    """Bytes of an event before and after its choices; ``data`` has none.

    Pydantic takes several times as long for an event as all else that is done for it, and nothing but the
    text of one choice differs in most.
    """
    before, _, after = event(data).partition(b'"choices":[]')
    return before + b'"choices":[', b"]" + after


#: The text of a choice for :func:`around_text`.
ANY_TEXT = "any text"


def around_text(choice: BaseModel) -> tuple[bytes, bytes]:
    """The JSON of a choice before and after its text, which is :data:`ANY_TEXT`."""
    before, _, after = choice.model_dump_json(exclude_unset=True).encode().partition(quoted(ANY_TEXT))
    return before, after


def named_event(name: str, data: Any) -> bytes:
    """An event with a name of its own."""
    return b"event: " + name.encode() + b"\ndata: " + compact(data) + b"\n\n"


async def named(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """Each event under the name that its ``type`` says."""
    async with aclosing(events):
        async for data in events:
            yield named_event(data["type"], data)


def error_event(error: SightlineError) -> bytes:
    """The event of an error in a stream that has begun, in OpenAI's form."""
    return b"data: " + compact(error_body(error)) + b"\n\n"


def quoted(text: str) -> bytes:
    """``text`` as JSON: what :func:`compact` gives in several times as long."""
    return encode_basestring(text).encode()


def compact(data: Any) -> bytes:
    """``data`` as JSON without spaces."""
    return _JSON.encode(data).encode()
