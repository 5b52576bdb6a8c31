"""Images whose answers are plain to see."""

import base64
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from tests.serving import Served

COLORS = {
    "red": (220, 20, 30),
    "green": (0, 150, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 220, 20),
    "orange": (255, 140, 0),
    "purple": (130, 40, 170),
    "pink": (255, 105, 180),
    "black": (20, 20, 20),
}


@dataclass(frozen=True)
class Case:
    """An image, a question about it, and a word that the right answer has and wrong ones lack."""

    picture: Image.Image
    question: str
    word: str


def blank(size: tuple[int, int] = (200, 160)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", size, "white")
    return picture, ImageDraw.Draw(picture)


def circle(color: str, size: tuple[int, int] = (200, 160)) -> Image.Image:
    picture, pen = blank(size)
    x, y, r = size[0] / 2, size[1] / 2, min(size) * 0.3
    pen.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[color])
    return picture


def square(color: str, size: tuple[int, int] = (200, 160)) -> Image.Image:
    picture, pen = blank(size)
    x, y, r = size[0] / 2, size[1] / 2, min(size) * 0.27
    pen.rectangle((x - r, y - r, x + r, y + r), fill=COLORS[color])
    return picture


def triangle(color: str) -> Image.Image:
    picture, pen = blank()
    pen.polygon([(100, 30), (150, 125), (50, 125)], fill=COLORS[color])
    return picture


def word(text: str) -> Image.Image:
    picture, pen = blank((230, 120))
    pen.text((30, 30), text, fill="black", font=ImageFont.load_default(size=52))
    return picture


def row_of_circles(count: int) -> Image.Image:
    picture, pen = blank((260, 140))
    for i in range(count):
        pen.ellipse((15 + 60 * i, 45, 60 + 60 * i, 90), fill=COLORS["blue"])
    return picture


#: Sixteen questions, each about another image.
CASES = [
    *(Case(circle(color), "What color is the circle?", color) for color in COLORS),
    Case(square("red", (140, 210)), "What shape is this?", "square"),
    Case(circle("green", (300, 130)), "What shape is this?", "circle"),
    Case(triangle("blue"), "What shape is this?", "triangle"),
    Case(row_of_circles(1), "How many circles are there?", "1"),
    Case(row_of_circles(2), "How many circles are there?", "2"),
    Case(row_of_circles(3), "How many circles are there?", "3"),
    Case(word("CAT"), "What does it say?", '"CAT"'),
    Case(word("STOP"), "What does it say?", '"STOP"'),
]


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(question: str, *pictures: Image.Image) -> list[dict]:
    """Messages with the images, then the question."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@contextmanager
def silent_image(served: Served) -> Iterator[str]:
    """The address of an image that does not come as long as the block runs."""
    pipe = served.pictures / uuid.uuid4().hex
    # Whoever opens it for reading waits for a writer.
    os.mkfifo(pipe)
    try:
        yield f"{served.site}/{pipe.name}"
    finally:
        writer = os.open(pipe, os.O_RDWR)
        pipe.unlink()
        os.close(writer)


def looking_at(*urls: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]
