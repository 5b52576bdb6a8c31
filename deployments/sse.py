"""Server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.errors import as_sightline, error_body
from deployments.report import current_report
from engine.errors import SightlineError

DONE = b"data: [DONE]\n\n"

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

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[SightlineError], bytes],
        end: bytes = b"",
    ) -> None:
        # No proxy may collect events before it passes them on.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._failed, self._end = events, failed, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send the events to their end. Nothing stands between an event and ``send``: most hold one token."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        try:
            async for each in self._events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
        except OSError:
            # The client is gone: nothing can be sent.
            raise
        except Exception as error:
            reported = as_sightline(error)
            # The request's line in the log will name it.
            current_report().error = reported
            await send({"type": "http.response.body", "body": self._failed(reported), "more_body": True})
        if self._end:
            await send({"type": "http.response.body", "body": self._end, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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


def compact(data: Any) -> bytes:
    """``data`` as JSON without spaces."""
    return _JSON.encode(data).encode()
