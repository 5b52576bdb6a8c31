"""Image files written from their formats' definitions, byte by byte."""

import struct
import zlib

import numpy as np


def chunk(kind, body, checksum=None):
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def packed(samples, bits):
    """Rows of integer samples ``(height, n)``, most significant bit first, each row filled up to a byte."""
    rows = []
    for row in samples:
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    return rows


def png(samples, bits, kind, *chunks):
    """A PNG of ``samples`` ``(height, width, channels)``; ``chunks`` stand before its data."""
    height, width, channels = samples.shape
    rows = packed(samples.reshape(height, width * channels), bits)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(samples, bits, photometric, *, order="<", sample_format=1, orientation=None):
    """An uncompressed TIFF of one strip of ``samples`` ``(height, width)`` or ``(height, width, 3)``."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if bits in (16, 32):
        code = {1: "u", 2: "i", 3: "f"}[sample_format]
        data = flat.astype(f"{order}{code}{bits // 8}").tobytes()
    else:
        data = b"".join(packed(flat, bits))
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    assert channels == 1 or bits == 8
    tags = {256: width, 257: height, 259: 1, 262: photometric, 277: channels, 278: height, 339: sample_format}
    if orientation is not None:
        tags[274] = orientation
    entries = [(tag, 3, 1, struct.pack(order + "HH", value, 0)) for tag, value in tags.items()]
    count = len(entries) + 3
    after = 8 + 2 + 12 * count + 4
    depths = struct.pack(order + "H" * channels, *[bits] * channels)
    place = struct.pack(order + "I", after) if len(depths) > 4 else depths.ljust(4, b"\0")
    start = after + (len(depths) if len(depths) > 4 else 0)
    entries += [
        (258, 3, channels, place),
        (273, 4, 1, struct.pack(order + "I", start)),
        (279, 4, 1, struct.pack(order + "I", len(data))),
    ]
    directory = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    extra = depths if len(depths) > 4 else b""
    return head + struct.pack(order + "H", count) + directory + bytes(4) + extra + data


def bmp(pixels, alpha):
    """A 32-bit BMP with masks for all four bytes, of ``pixels`` ``(height, width, 3)`` and ``alpha``."""
    height, width = alpha.shape
    data = np.dstack([pixels[::-1, :, ::-1], alpha[::-1]]).astype(np.uint8).tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data


def gif(canvas, frame, *, transparent):
    """A GIF of a red rectangle ``frame`` ``(left, top, width, height)`` on a blue background."""
    data = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 1, 0) + bytes([255, 0, 0, 0, 0, 255])
    if transparent:
        data += b"\x21\xf9\x04\x01\0\0\x01\0"
    data += b"\x2c" + struct.pack("<HHHHB", *frame, 0)
    # Every pixel is preceded by a clear code, so that codes stay 3 bits long.
    codes = [code for _ in range(frame[2] * frame[3]) for code in (4, 0)] + [5]
    bits = "".join(format(code, "03b")[::-1] for code in codes)
    packed_codes = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    assert len(packed_codes) < 256
    return data + b"\x02" + bytes([len(packed_codes)]) + packed_codes + b"\0;"


def cmyk_profile(ink):
    """A colour profile: CMYK is a mixture of 16 corners, each of them ``ink(c, m, y, k)`` in Lab."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = bytes(value for corner in corners for value in ink(*corner))
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text" + bytes(4) + b"none\0"
    tags, body, start = [], b"", 128 + 4 + 3 * 12
    for name, value in ((b"A2B0", lut), (b"wtpt", white), (b"cprt", text)):
        value += bytes(-len(value) % 4)
        tags.append(name + struct.pack(">II", start + len(body), len(value)))
        body += value
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(4) + bytes(4) + bytes(8) + bytes(8)
    head += bytes(4) + struct.pack(">3i", 63190, 65536, 54061) + b"none"
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + b"".join(tags) + body
