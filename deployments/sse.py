"""Server-sent events, as OpenAI's clients read them."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.errors import error_body, log_answered
from engine.errors import SightlineError

DONE = b"data: [DONE]\n\n"


class EventResponse(StreamingResponse):
    """A response of events.

    When a client goes away, Starlette leaves the other events to the garbage collector. Until then the engine
    would hold the request's memory, so this response closes them.

    Args:
        events: the events; closed when the response ends, in whatever way.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # No proxy may collect events before it passes them on.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def event(data: BaseModel) -> bytes:
    """One event."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """An event with a name of its own."""
    return b"event: " + name.encode() + b"\ndata: " + compact(data) + b"\n\n"


def error_event(error: SightlineError) -> bytes:
    """The event of an error in a stream that has begun. Logs the error in one line."""
    log_answered(error, "a stream")
    return b"data: " + compact(error_body(error)) + b"\n\n"


def compact(data: Any) -> bytes:
    """``data`` as JSON without spaces."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
