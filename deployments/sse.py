"""Server-sent events, as OpenAI's clients read them."""

import json
from typing import Any

from pydantic import BaseModel

from deployments.errors import error_body
from engine.errors import SightlineError

MEDIA_TYPE = "text/event-stream"
#: No proxy on the way may gather events.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


def event(data: BaseModel) -> bytes:
    """One event."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def error_event(error: SightlineError) -> bytes:
    """What a stream that has begun says when it can't go on."""
    return b"data: " + compact(error_body(error)) + b"\n\n"


def compact(data: Any) -> bytes:
    """``data`` as JSON without spaces."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
