"""Reads request bodies: with a limit on their size, and without blocking the event loop."""

import asyncio
import json
import zlib
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from deployments.errors import BadBody, BodyTooLarge
from deployments.protocol.base import RequestBody

M = TypeVar("M", bound=RequestBody)

#: zlib's window sizes, which tell the formats apart.
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}

#: Larger bodies are parsed on a thread.
_LARGE = 1 << 17


async def read_body(request: Request, model: type[M], limit: int) -> M:
    """Read and parse the body.

    Args:
        model: the form of the body.
        limit: the most bytes.

    Raises:
        BodyTooLarge: naming the limit; the rest is not read.
        BadBody, UnsupportedParameter: naming the field at fault.
    """
    length, encoding = b"", "identity"
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            length = value
        elif name == b"content-encoding":
            encoding = value.decode("latin-1").strip().lower()
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(_too_large(limit))
    chunks, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise BodyTooLarge(_too_large(limit))
        more = message.get("more_body", False)
    body = b"".join(chunks)
    if encoding not in ("identity", ""):
        body = await asyncio.to_thread(_decompressed, body, encoding, limit)
        size = len(body)
    if size > _LARGE:
        return await asyncio.to_thread(_parse, body, model)
    return _parse(body, model)


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """``body`` without its encoding; never more than ``limit`` bytes are made."""
    if encoding not in _WINDOW_BITS:
        raise BadBody(f"The content encoding {encoding[:40]!r} is not supported; gzip and deflate are.")
    decoder = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        data = decoder.decompress(body, limit + 1)
    except zlib.error:
        raise BadBody(f"The body is not valid {encoding}.") from None
    if len(data) > limit:
        raise BodyTooLarge(_too_large(limit))
    if not decoder.eof:
        raise BadBody(f"The {encoding} body ends too soon.")
    return data


def _parse(body: bytes, model: type[M]) -> M:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(_no_json(body, error)) from None
    if not isinstance(data, dict):
        raise BadBody("The body must be a JSON object.")
    return model.read(data)


def _no_json(body: bytes, error: Exception) -> str:
    """Why a body can't be parsed, and where."""
    if not body.strip():
        return "The body is empty. Send a JSON object."
    if isinstance(error, json.JSONDecodeError):
        return f"The body is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}."
    if isinstance(error, RecursionError):
        return "The body is not valid JSON: it is nested too deeply."
    # An integer of thousands of digits is valid, but Python reads none.
    return "The body is not JSON in UTF-8, or has a number that is too long."


def _too_large(limit: int) -> str:
    return f"The request body has more than {limit} bytes. Send fewer or smaller images, or their URLs."
