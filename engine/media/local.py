"""Media that a request brings itself or that lies on this machine: data URLs and files."""

from __future__ import annotations

import base64
import os
import stat
import string
from contextlib import suppress
from pathlib import Path

import numpy as np

from engine.errors import MediaError, MediaForbidden
from engine.media.guard import FetchPolicy
from engine.media.limits import ByteBudget, check_size
from engine.media.source import MediaSource

#: From this size on, decoding a data URL would hold up an event loop.
_LARGE = 1 << 18
_EXAMPLES = {"video": "video/mp4", "document": "application/pdf"}


def is_remote(url: str) -> bool:
    """Return whether fetching ``url`` needs the network."""
    return not _is_file(url) and url[:5].lower() != "data:"


def takes_long(source: MediaSource) -> bool:
    """Return whether :func:`read_local` would hold up an event loop."""
    return source.url is not None and (_is_file(source.url) or len(source.url) > _LARGE)


def read_local(source: MediaSource, policy: FetchPolicy, budget: ByteBudget) -> bytes:
    """The bytes of a source that needs no network.

    Raises:
        MediaForbidden: the policy doesn't allow the file.
        MediaTooLarge: the item or the budget is too large.
        MediaError: there is no such file, or the data URL is malformed.
    """
    where = source.where
    if source.data is not None:
        data = source.data
    elif source.url is None:
        raise MediaError(f"{where}: there is neither a URL nor data.", param=where)
    elif _is_file(source.url):
        data = _read_file(source, source.url, policy)
    else:
        data = _decode_data_url(source, source.url, policy)
    check_size(len(data), policy, source)
    budget.take(len(data), where)
    return data


def _decode_data_url(source: MediaSource, url: str, policy: FetchPolicy) -> bytes:
    where = source.where
    head, comma, payload = url.partition(",")
    _, semicolon, encoding = head.rpartition(";")
    if not comma or not semicolon or encoding.strip(" ").lower() != "base64":
        example = _EXAMPLES.get(source.kind, "image/png")
        raise MediaError(f"{where}: a data URL must look like data:{example};base64,...", param=where)
    check_size(len(payload) // 4 * 3 - 2, policy, source)
    with suppress(ValueError):
        return base64.b64decode(payload, validate=True)
    try:
        return _forgiving_base64(payload)
    except ValueError:
        raise MediaError(f"{where}: the data URL is not valid base64.", param=where) from None


def _forgiving_base64(payload: str) -> bytes:
    """Decode base64 with line breaks, with percent signs, or without padding, as browsers read a data URL.

    https://infra.spec.whatwg.org/#forgiving-base64-decode, behind the percent-decoding of
    https://fetch.spec.whatwg.org/#data-url-processor.

    Raises:
        ValueError: it isn't such either.
    """
    text = _percent_decoded(payload.encode()).translate(None, b"\t\n\f\r ")
    if len(text) % 4 == 0:
        text = text[:-2] + text[-2:].rstrip(b"=")
    if b"=" in text:
        raise ValueError("padding in the wrong place")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


#: The values of hexadecimal digits, by their codes; 255 for other bytes.
_DIGITS = np.array(
    [int(chr(code), 16) if chr(code) in string.hexdigits else 255 for code in range(256)], np.uint8
)


def _percent_decoded(text: bytes) -> bytes:
    """``text`` with a byte in place of each ``%XX``; a ``%`` without two digits stays.

    It takes some six bytes of memory for each byte of ``text``. Python's ``unquote_to_bytes`` makes an object
    for each ``%``, of some 200 bytes.
    """
    if b"%" not in text:
        return text
    codes = np.frombuffer(text, np.uint8).copy()
    digits = _DIGITS[codes]
    high, low = digits[1:-1], digits[2:]
    is_escape = (codes[:-2] == ord("%")) & (high < 16) & (low < 16)
    codes[:-2][is_escape] = high[is_escape] << 4 | low[is_escape]
    kept = np.ones(len(codes), bool)
    kept[1:-1] &= ~is_escape
    kept[2:] &= ~is_escape
    return codes[kept].tobytes()


def _read_file(source: MediaSource, url: str, policy: FetchPolicy) -> bytes:
    where, allowed = source.where, policy.allowed_local_media_path
    if allowed is None:
        raise MediaForbidden(f"{where}: this server reads no files.", param=where)
    host, slash, rest = url[len("file://") :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise MediaForbidden(f"{where}: a file URL must look like file:///folder/name.", param=where)
    try:
        path = Path(os.fsdecode(b"/" + _percent_decoded(rest.encode()))).resolve()
        inside = path.is_relative_to(Path(allowed).resolve())
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise MediaForbidden(f"{where}: the file is outside of the folder that may be read.", param=where)
    try:
        return _read_regular(path, policy.byte_limit(source.kind) + 1)
    except OSError:
        raise MediaError(f"{where}: there is no such file.", param=where) from None


def _read_regular(path: Path, count: int) -> bytes:
    """Up to ``count`` bytes of a regular file; OSError for anything else."""
    # Non-blocking, because opening a pipe without a writer would wait for one.
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(f"{path} is no regular file")
        with os.fdopen(opened, "rb", closefd=False) as file:
            return file.read(count)
    finally:
        os.close(opened)


def _is_file(url: str) -> bool:
    return url[:7].lower() == "file://"
