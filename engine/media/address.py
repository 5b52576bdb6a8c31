"""Addresses as their writers spelled them: signed URLs are valid letter by letter only."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_ORIGIN = re.compile(r"[^:/?#]+://[^/?#]*")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


def request_target(address: str) -> str:
    """Path and query of an absolute URL as they are written, without the fragment.

    Only characters that can't stand in a request are percent-encoded: those beyond ASCII, as UTF-8.

    Args:
        address: may hold bytes that are not UTF-8 as surrogates (``surrogateescape``).
    """
    address = address.partition("#")[0]
    origin = _ORIGIN.match(address)
    target = address[origin.end() :] if origin else address
    if not target.startswith("/"):
        target = "/" + target
    return _BEYOND_ASCII.sub(_percent_encoded, target)


def redirect_target(base: str, location: str) -> str | None:
    """The absolute URL that a ``Location`` header leads to from ``base``, spelled as in the header.

    Spaces are percent-encoded, as browsers do. Returns None if it is empty or has a control character or a
    backslash, which parsers read differently.
    """
    location = location.strip(" ")
    if not location or re.search(r"[\x00-\x1f\x7f-\x9f\\]", location):
        return None
    location = location.replace(" ", "%20")
    if _SCHEME.match(location):
        return location
    scheme, origin = base.partition(":")[0], _ORIGIN.match(base)
    assert origin is not None, "the base is absolute"
    if location.startswith("//"):
        return f"{scheme}:{location}"
    path = base[origin.end() :].partition("#")[0]
    if location.startswith("#"):
        return origin.group() + path
    path = path.partition("?")[0] or "/"
    if location.startswith("?"):
        return origin.group() + path + location
    if not location.startswith("/"):
        location = path[: path.rindex("/") + 1] + location
    end = re.search(r"[?#]|$", location)
    assert end is not None
    return origin.group() + _without_dots(location[: end.start()]) + location[end.start() :]


def _without_dots(path: str) -> str:
    """An absolute path without its segments ``.`` and ``..`` (RFC 3986, 5.2.4)."""
    kept: list[str] = []
    *segments, last = path.split("/")[1:]
    for segment in [*segments, "" if last in (".", "..") else last]:
        if segment == ".." and kept:
            kept.pop()
        elif segment not in (".", ".."):
            kept.append(segment)
    if last == ".." and len(kept) > 1:
        del kept[-2]
    return "/" + "/".join(kept)


def _percent_encoded(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogateescape"))
