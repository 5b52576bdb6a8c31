"""PDF files for tests, written byte by byte (ISO 32000-1)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

#: Fills up passwords (algorithm 2).
_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def page(
    text: str = "", colour: tuple[float, float, float] = (1, 1, 1), size: tuple[float, float] = (200, 100)
) -> tuple[bytes, bytes]:
    """The boxes and the content of a page: a text on a disc-less field of one colour."""
    width, height = size
    filled = f"{' '.join(map(str, colour))} rg 0 0 {width} {height} re f "
    written = f"0 g BT /F 18 Tf 20 40 Td ({text}) Tj ET"
    return f"/MediaBox [0 0 {width:g} {height:g}]".encode(), (filled + written).encode()


def pdf(
    pages: Sequence[tuple[bytes, bytes]],
    *,
    extra: bytes = b"",
    objects: Sequence[bytes] = (),
    key: bytes | None = None,
) -> bytes:
    """A file with ``pages`` as :func:`page` makes them.

    Args:
        extra: entries of the catalog.
        objects: further objects; the first is number 4 + 2 * len(pages).
        key: encrypts content as the password that is needed to open the file (revision 2, 40 bits).
    """
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R " + extra + b" >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % len(pages),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, (boxes, content) in enumerate(pages):
        bodies.append(
            b"<< /Type /Page /Parent 2 0 R " + boxes + b" /Resources << /Font << /F 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (5 + 2 * i)
        )
        if key is not None:
            content = _encrypted(content, 5 + 2 * i, key)
        bodies.append(b"<< /Length %d >>\nstream\n" % len(content) + content + b"\nendstream")
    bodies += objects
    trailer = b"/Root 1 0 R"
    if key is not None:
        owner, user = _passwords(key)
        bodies.append(
            b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <"
            + owner.hex().encode()
            + b"> /U <"
            + user.hex().encode()
            + b"> >>"
        )
        trailer += b" /Encrypt %d 0 R /ID [<00> <00>]" % len(bodies)
    file, places = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(bodies, 1):
        places.append(len(file))
        file += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(file)
    file += b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    file += b"".join(b"%010d 00000 n \n" % place for place in places)
    file += b"trailer\n<< /Size %d " % (len(bodies) + 1) + trailer + b" >>\nstartxref\n%d\n%%%%EOF\n" % start
    return bytes(file)


def _passwords(key: bytes) -> tuple[bytes, bytes]:
    """The entries O and U (algorithms 3 and 4)."""
    padded = (key + _PADDING)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    return owner, _rc4(_file_key(key, owner), _PADDING)


def _file_key(key: bytes, owner: bytes) -> bytes:
    return hashlib.md5((key + _PADDING)[:32] + owner + struct.pack("<i", -4) + b"\0").digest()[:5]


def _encrypted(content: bytes, number: int, key: bytes) -> bytes:
    owner, _ = _passwords(key)
    salted = _file_key(key, owner) + struct.pack("<I", number)[:3] + b"\0\0"
    return _rc4(hashlib.md5(salted).digest()[:10], content)


def _rc4(key: bytes, data: bytes) -> bytes:
    box, j = list(range(256)), 0
    for i in range(256):
        j = (j + box[i] + key[i % len(key)]) % 256
        box[i], box[j] = box[j], box[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + box[i]) % 256
        box[i], box[j] = box[j], box[i]
        out.append(byte ^ box[(box[i] + box[j]) % 256])
    return bytes(out)
