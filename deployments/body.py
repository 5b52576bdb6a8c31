"""Reads request bodies: with a limit on their size, and without blocking the event loop."""

import asyncio
import json
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect, Request

from deployments.errors import BadBody, BodyTooLarge, BodyTooSlow
from deployments.protocol.base import RequestBody

M = TypeVar("M", bound=RequestBody)

#: zlib's window sizes, which tell the formats apart.
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}

#: Seconds within which the next piece of a body must come. A client whose network is gone would else hold one
#: of the places for open requests.
PIECE_S = 60.0

#: Larger bodies are parsed on a thread.
_LARGE = 1 << 17

#: Lists and objects within each other. What is read is walked by recursion where it is checked, kept and sent
#: back. How deep that can go depends on the release of Python. JSON schemas have a lower limit of their own.
_MAX_DEPTH = 256
#: The beginning of half a surrogate pair, as JSON spells it.
_SURROGATE = re.compile(r"\\u[dD]")
_HALF = "has half of a surrogate pair, which is no character. Cut texts between whole characters."
_INFINITE = "must be a finite number: JSON has no NaN or Infinity, and 1e308 is about the largest here."
_TOO_DEEP = f"The JSON is nested too deeply: more than {_MAX_DEPTH} lists and objects are within each other."

#: The way to a value within a body: its key or index, and the way to what holds it.
_Way: TypeAlias = "tuple[str | int, _Way] | None"


async def read_body(request: Request, model: type[M], limit: int, deadline: float | None = None) -> M:
    """Read and parse the body.

    Args:
        model: the form of the body.
        limit: the most bytes.
        deadline: when all of it must have come, by the event loop's clock; None for no limit.

    Raises:
        BodyTooLarge: naming the limit; the rest is not read.
        BodyTooSlow: it has not come in time.
        BadBody, UnsupportedParameter: naming the field at fault.
    """
    length, encoding, offers = b"", "identity", False
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            length = value
        elif name == b"content-encoding":
            encoding = value.decode("latin-1").strip().lower()
        elif name == b"upgrade":
            offers = True
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(_too_large(limit))
    body = await _received(request, limit, deadline)
    size = len(body)
    if offers and not body:
        # uvicorn drops it. Java's client offers HTTP/2 with each request.
        raise BadBody(
            "The body is lost, because the request offers another protocol in its header Upgrade. Have the "
            "client speak HTTP/1.1 alone (Java: HttpClient.Builder's version(HttpClient.Version.HTTP_1_1))."
        )
    if encoding not in ("identity", ""):
        body = await asyncio.to_thread(_decompressed, body, encoding, limit)
        size = len(body)
    if size > _LARGE:
        return await asyncio.to_thread(_parse, body, model)
    return _parse(body, model)


async def _received(request: Request, limit: int, deadline: float | None) -> bytes:
    """All of the body; arguments and errors as of :func:`read_body`."""
    chunks, size, more = [], 0, True
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as patience:
            while more:
                until = clock() + PIECE_S
                patience.reschedule(until if deadline is None else min(until, deadline))
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > limit:
                    raise BodyTooLarge(_too_large(limit))
                more = message.get("more_body", False)
    except TimeoutError:
        raise BodyTooSlow("The rest of the request's body has not come in time; send it again.") from None
    return b"".join(chunks)


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
        # Not the bytes: json takes half a surrogate in UTF-8 for a character, and other encodings too.
        text = body.decode("utf-8-sig")
        data, is_finite = _loaded(text)
    except (ValueError, RecursionError) as error:
        raise BadBody(_no_json(body, error)) from None
    if not isinstance(data, dict):
        raise BadBody("The body must be a JSON object.")
    if _may_be_deep(text) and _is_deep(data):
        raise BadBody(_TOO_DEEP)
    # The single character is found a hundred times as fast.
    if "\\" in text and _SURROGATE.search(text):
        _refuse(data, _is_half, _HALF)
    if not is_finite:
        _refuse(data, _is_infinite, _INFINITE)
    return model.read(data)


def _loaded(text: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether all of its numbers are finite: Python reads ``NaN`` and
    ``Infinity``, which JSON doesn't have, and makes infinity of ``1e400``.

    Raises:
        ValueError, RecursionError: it can't be read.
    """
    odd: list[str] = []

    def number(spelled: str) -> float:
        value = float(spelled)
        if not math.isfinite(value):
            odd.append(spelled)
        return value

    return json.loads(text, parse_float=number, parse_constant=number), not odd


def _may_be_deep(text: str) -> bool:
    """Return whether more than :data:`_MAX_DEPTH` lists and objects begin in a JSON text.

    To find the next one takes a tenth of the time that counting takes: megabytes of an image have none.
    """
    begun = 0
    for opening in "[{":
        place = text.find(opening)
        while place >= 0:
            begun += 1
            if begun > _MAX_DEPTH:
                return True
            place = text.find(opening, place + 1)
    return False


def _is_deep(data: Any) -> bool:
    """Return whether more than :data:`_MAX_DEPTH` lists and objects are within each other."""
    level = [data]
    for _ in range(_MAX_DEPTH):
        inner = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _refuse(data: Any, is_bad: Callable[[Any], bool], said: str) -> None:
    """Refuse a body that has a bad value, or a field of a bad name.

    Args:
        said: what is wrong with it, behind the name of the field.

    Raises:
        BadBody: naming the field.
    """
    # Values, each with the way to it: links of a key and the link before it.
    waiting: list[tuple[Any, _Way]] = [(data, None)]
    while waiting:
        value, way = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if is_bad(key):
                    raise _bad(way, said)
                waiting.append((inner, (key, way)))
        elif isinstance(value, list):
            waiting += [(inner, (index, way)) for index, inner in enumerate(value)]
        elif is_bad(value):
            raise _bad(way, said)


def _is_half(value: Any) -> bool:
    """A lone surrogate, which JSON can spell, but which is no text: neither tokens nor UTF-8 have it."""
    if not isinstance(value, str) or value.isascii():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_infinite(value: Any) -> bool:
    """A number that no JSON spells, so that no answer could repeat it."""
    return isinstance(value, float) and not math.isfinite(value)


def _bad(way: _Way, said: str) -> BadBody:
    names: list[str] = []
    while way is not None:
        key, way = way
        names.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    field = "".join(reversed(names)).removeprefix(".")[:200]
    return BadBody(f"{field or 'The name of a field'} {said}", param=field or None)


def _no_json(body: bytes, error: Exception) -> str:
    """Why a body can't be parsed, and where."""
    if not body.strip():
        return "The body is empty. Send a JSON object."
    if isinstance(error, json.JSONDecodeError):
        return f"The body is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}."
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    # An integer of thousands of digits is valid, but Python reads none.
    return "The body is not JSON in UTF-8, or has a number that is too long."


def _too_large(limit: int) -> str:
    return f"The request body has more than {limit} bytes. Send fewer or smaller images, or their URLs."
