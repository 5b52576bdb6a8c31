"""Images of many kinds over HTTP: the model sees what a viewer shows."""

import base64
import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.deployments.pictures import circle
from tests.engine.media.files import chunk, png

pytestmark = pytest.mark.usefixtures("idle_afterwards")

RED = circle("red", (96, 96))


def saved(form: str, image: Image.Image = RED, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bitmap_without_alpha() -> bytes:
    """A bitmap of 32 bits, such as clipboards make, whose alpha is 0 everywhere."""
    pixels = np.asarray(RED)[::-1, :, ::-1]
    body = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)]).tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, 96, 96, 1, 32, 3, len(body), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return saved("JPEG", RED.rotate(90, expand=True), quality=95, exif=exif)


def with_transparent_background() -> bytes:
    """16 bits a sample, of which white is the transparent colour."""
    samples = np.asarray(RED).astype(int) * 257
    return png(samples, 16, 2, chunk(b"tRNS", struct.pack(">3H", 65535, 65535, 65535)))


FILES = {
    "GIF": saved("GIF"),
    "WebP": saved("WEBP", quality=90),
    "TIFF, CMYK": saved("TIFF", RED.convert("CMYK")),
    "BMP without alpha": bitmap_without_alpha(),
    "JPEG, turned": turned(),
    "JPEG, cut": saved("JPEG", quality=95)[:-40],
    "PNG, 16 bits and a transparent colour": with_transparent_background(),
}


@pytest.mark.parametrize("name", FILES)
async def test_a_red_circle_is_red(client, name):
    url = "data:image/png;base64," + base64.b64encode(FILES[name]).decode()
    question = {"type": "text", "text": "What color is the circle?"}
    content = [{"type": "image_url", "image_url": {"url": url}}, question]
    made = await client.chat.completions.create(
        model="pocket", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=20
    )
    assert "red" in made.choices[0].message.content
