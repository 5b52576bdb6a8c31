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
        self._events = _to_the_end(events, failed, end)
        # No proxy may collect events before it passes them on.
        super().__init__(self._events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _to_the_end(
    events: AsyncGenerator[bytes, None], failed: Callable[[SightlineError], bytes], end: bytes
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except Exception as error:
            reported = as_sightline(error)
            # The request's line in the log will name it.
            current_report().error = reported
            yield failed(reported)
    if end:
        yield end


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
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
