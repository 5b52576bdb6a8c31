"""Server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.errors import as_sightline, error_body
from deployments.leaving import WhileListenedTo
from deployments.report import current_report
from engine.errors import SightlineError

DONE = b"data: [DONE]\n\n"

#: No proxy may collect events before it passes them on.
_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)

#: ``json.dumps`` would make one for each call.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class EventResponse(StreamingResponse):
    """A response of events.

    When a client goes away, Starlette leaves the other events to the garbage collector. Until then the engine
    would hold the request's memory, so this response closes them.

    Args:
        events: the events; closed when the response ends, in whatever way.
        failed: makes the last event of a stream that fails.
        end: sent after all events, after a failure as well.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[SightlineError], bytes],
        end: bytes = b"",
    ) -> None:
        # Without Starlette's own way, which encodes the same headers for each response.
        self.status_code, self.background = 200, None
        self.raw_headers = list(_HEADERS)
        self._events, self._failed, self._end = events, failed, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), WhileListenedTo(receive):
            await self.stream_response(send)

    async def stream_response(self, send: Send) -> None:
        """Send the events to their end. Nothing stands between an event and the server, since most hold one
        token."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        report = current_report()
        response = report.response
        assert response is not None, "every HTTP request has one"
        try:
            async for each in self._events:
                await response.body(each)
        except OSError:
            # Nothing can be sent any more.
            raise ClientDisconnect from None
        except Exception as error:
            reported = as_sightline(error)
            # The request's line in the log will name it.
            report.error = reported
            await response.body(self._failed(reported))
        if self._end:
            await response.body(self._end)
        await response.body(b"", more=False)


def event(data: BaseModel) -> bytes:
    """One event."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


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
