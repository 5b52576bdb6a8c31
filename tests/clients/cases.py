"""Questions of every client, and the answers that it must get. Needs no package but Python's own."""

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

MODEL, EMBEDDER = "pocket-tools", "pocket-embed"
GREETING = "Hello!"
QUESTION = "Describe the picture."
REQUEST = "Report what you see."
WEATHER = "What is the weather in Paris?"
#: What the picture shows.
FACTS = {"color": "red", "shape": "circle", "count": 3}
PARAMETERS = {
    "type": "object",
    "properties": {"color": {"type": "string"}, "shape": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["color", "shape", "count"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "report", "description": "Reports a picture.", "parameters": PARAMETERS},
}


def report(color: str, shape: str, count: int) -> str:
    """Report a picture.

    Args:
        color: the color of the shapes
        shape: the kind of the shapes
        count: how many shapes there are
    """
    return "saved" if is_right({"color": color, "shape": shape, "count": count}) else "Error: not allowed"


def png() -> bytes:
    """Three red circles on white, 168 pixels a side."""
    side, radius = 168, 22
    centres = ((44, 44), (120, 62), (72, 124))
    red, white = bytes((255, 0, 0)), bytes((255, 255, 255))
    rows = b"".join(
        b"\0"
        + b"".join(
            red if any((x - a) ** 2 + (y - b) ** 2 <= radius**2 for a, b in centres) else white
            for x in range(side)
        )
        for y in range(side)
    )

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
        return size + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


def question(text: str = QUESTION) -> dict[str, Any]:
    """A message about the picture, in OpenAI's form."""
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": DATA_URL}},
            {"type": "text", "text": text},
        ],
    }


def is_caption(text: str | None) -> bool:
    """Return whether a text says what the picture shows."""
    return "three red circles" in (text or "").lower()


def is_greeting(text: str | None) -> bool:
    return "Show me a picture" in (text or "")


def is_right(facts: Mapping[str, Any] | str) -> bool:
    """Return whether arguments or an object in JSON are those of the picture."""
    return (json.loads(facts) if isinstance(facts, str) else dict(facts)) == FACTS
