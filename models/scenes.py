"""Draws simple scenes: shapes, and written words. The world that the pocket models know.

Everything is decided by a seed. Training and evaluation draw from different seeds, and a few combinations of
colour and shape (``HELD_OUT``) are never drawn for training at all.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

COLORS: dict[str, list[tuple[int, int, int]]] = {
    "red": [(255, 0, 0), (220, 20, 30), (200, 30, 30), (225, 55, 45)],
    "green": [(0, 128, 0), (0, 170, 60), (40, 180, 40), (0, 255, 0), (60, 165, 75)],
    "blue": [(0, 0, 255), (30, 60, 220), (20, 90, 230), (55, 95, 215)],
    "yellow": [(255, 255, 0), (250, 220, 20), (240, 230, 40)],
    "orange": [(255, 165, 0), (255, 140, 0), (250, 130, 20)],
    "purple": [(128, 0, 128), (130, 40, 170), (110, 20, 150)],
    "pink": [(255, 192, 203), (255, 105, 180), (250, 130, 190)],
    "black": [(0, 0, 0), (20, 20, 20), (30, 30, 35)],
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
HELD_OUT = frozenset({("purple", "triangle"), ("orange", "star"), ("blue", "diamond"), ("green", "cross")})

LIGHT = [
    *[("white", (255, 255, 255))] * 4,
    ("white", (250, 250, 250)),
    ("gray", (225, 225, 225)),
    ("gray", (205, 205, 205)),
]
DARK = [("dark", (60, 60, 65)), ("dark", (45, 50, 60))]


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape on an image; centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(slots=True)
class Scene:
    """An image, and what is on it."""

    image: Image.Image
    background: str
    things: list[Thing] = field(default_factory=list)
    text: str | None = None


def _pick_color(rng: random.Random, name: str) -> tuple[int, int, int]:
    base = rng.choice(COLORS[name])
    return tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in base)  # type: ignore[return-value]


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        s = r * 0.88
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x + r * 0.95, y + r * 0.8), (x - r * 0.95, y + r * 0.8)]
    if shape == "diamond":
        return [(x, y - r), (x + r * 0.75, y), (x, y + r), (x - r * 0.75, y)]
    if shape == "star":
        points = []
        for i in range(10):
            reach = r if i % 2 == 0 else r * 0.42
            angle = -math.pi / 2 + i * math.pi / 5
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        return points
    assert shape == "cross"
    t = r * 0.32
    return [
        (x - t, y - r),
        (x + t, y - r),
        (x + t, y - t),
        (x + r, y - t),
        (x + r, y + t),
        (x + t, y + t),
        (x + t, y + r),
        (x - t, y + r),
        (x - t, y + t),
        (x - r, y + t),
        (x - r, y - t),
        (x - t, y - t),
    ]


def draw_thing(image: Image.Image, thing: Thing, rng: random.Random) -> None:
    pen = ImageDraw.Draw(image)
    fill = _pick_color(rng, thing.color)
    outline = (0, 0, 0) if rng.random() < 0.15 else None
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=outline)
    else:
        pen.polygon(_polygon(thing.shape, x, y, r), fill=fill, outline=outline)


def _background(rng: random.Random, dark: bool) -> tuple[str, tuple[int, int, int]]:
    if dark:
        return rng.choice(DARK)
    if rng.random() < 0.2:
        # Pastels: no colour of a shape is that pale.
        hue = [rng.randint(222, 228), rng.randint(222, 250), rng.randint(243, 250)]
        rng.shuffle(hue)
        return "light", (hue[0], hue[1], hue[2])
    return rng.choice(LIGHT)


def random_pair(rng: random.Random, held_out: bool | None) -> tuple[str, str]:
    """A colour and a shape; with ``held_out`` one of those never seen in training, with None any."""
    if held_out:
        return rng.choice(sorted(HELD_OUT))
    while True:
        pair = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if held_out is None or pair not in HELD_OUT:
            return pair


def _place(rng: random.Random, size: tuple[int, int], radii: list[float]) -> list[tuple[float, float]] | None:
    """Centres for circles of ``radii`` that don't touch each other or the border; None if there's no room."""
    width, height = size
    centres: list[tuple[float, float]] = []
    for radius in radii:
        for _ in range(40):
            x = rng.uniform(radius + 2, width - radius - 2)
            y = rng.uniform(radius + 2, height - radius - 2)
            if all(
                math.hypot(x - a, y - b) > (radius + other) * 1.12
                for (a, b), other in zip(centres, radii, strict=False)
            ):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def shapes_scene(rng: random.Random, size: tuple[int, int], pairs: list[tuple[str, str]]) -> Scene:
    """A scene with one thing per (colour, shape)."""
    side = min(size)
    dark = rng.random() < 0.1 and all(color not in ("black", "purple") for color, _ in pairs)
    name, fill = _background(rng, dark)
    image = Image.new("RGB", size, fill)
    low, high = {1: (0.1, 0.44), 2: (0.1, 0.28), 3: (0.09, 0.22)}.get(len(pairs), (0.08, 0.17))
    while True:
        radii = [max(7.0, rng.uniform(low, high) * side) for _ in pairs]
        centres = _place(rng, size, radii)
        if centres is not None:
            break
        high = max(low, high * 0.9)
    things = [
        Thing(shape, color, x, y, r) for (color, shape), (x, y), r in zip(pairs, centres, radii, strict=True)
    ]
    for thing in things:
        draw_thing(image, thing, rng)
    return Scene(_finish(image, rng), name, things)


def text_scene(rng: random.Random, size: tuple[int, int], text: str) -> Scene:
    """A scene with one written word or number, large enough to read."""
    dark = rng.random() < 0.15
    name, fill = _background(rng, dark)
    image = Image.new("RGB", size, fill)
    pen = ImageDraw.Draw(image)
    colors = ["yellow", "pink", "orange"] if dark else [c for c in COLORS if c not in ("yellow", "pink")]
    color = "black" if not dark and rng.random() < 0.5 else rng.choice(colors)
    # As wide as the image allows at most, and never smaller than can be read after scaling down.
    largest = min(size[1] * 0.6, size[0] * 0.9 / (0.72 * len(text)))
    smallest = min(largest, max(24.0, 0.2 * size[1], 0.13 * size[0]))
    font = ImageFont.load_default(size=rng.uniform(smallest, largest))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    x = rng.uniform(2, max(3, size[0] - (right - left) - 2)) - left
    y = rng.uniform(2, max(3, size[1] - (bottom - top) - 2)) - top
    pen.text((x, y), text, fill=_pick_color(rng, color), font=font)
    return Scene(_finish(image, rng), name, [], text)


def _finish(image: Image.Image, rng: random.Random) -> Image.Image:
    """Now and then what cameras and file formats do to images."""
    if rng.random() < 0.15:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height from 80 to 480 pixels, sides at most 2.5 to 1."""
    area = rng.uniform(110, 300) ** 2
    ratio = math.exp(rng.uniform(-0.9, 0.9)) if rng.random() < 0.6 else 1.0
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return max(80, min(480, round(width))), max(80, min(480, round(height)))
