"""Images for the examples, drawn here: nothing has to be downloaded.

python examples/pictures.py FOLDER      # writes them as PNG files
"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def two_shapes() -> Image.Image:
    """A red circle beside a blue square."""
    picture = Image.new("RGB", (224, 160), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((20, 45, 90, 115), fill="red")
    pen.rectangle((130, 45, 200, 115), fill="blue")
    return picture


def red_square() -> Image.Image:
    """A red square alone."""
    picture = Image.new("RGB", (180, 180), "white")
    ImageDraw.Draw(picture).rectangle((50, 50, 130, 130), fill="red")
    return picture


def green_triangle() -> Image.Image:
    """A green triangle alone."""
    picture = Image.new("RGB", (180, 180), "white")
    ImageDraw.Draw(picture).polygon([(90, 30), (150, 140), (30, 140)], fill="green")
    return picture


def three_stars() -> Image.Image:
    """Three green stars."""
    picture = Image.new("RGB", (200, 200), "white")
    for x, y in ((55, 55), (145, 80), (80, 145)):
        points = []
        for corner in range(10):
            # Tips, and between them corners that lie further in.
            reach, angle = (34, 14)[corner % 2], math.pi * (corner / 5 - 0.5)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        ImageDraw.Draw(picture).polygon(points, fill="green")
    return picture


def word() -> Image.Image:
    """The word HELLO."""
    picture = Image.new("RGB", (260, 140), "white")
    ImageDraw.Draw(picture).text((30, 40), "HELLO", fill="black", font=ImageFont.load_default(size=56))
    return picture


def moving_circle(count: int) -> list[Image.Image]:
    """Frames of a blue circle that goes from left to right."""
    frames = []
    for index in range(count):
        picture = Image.new("RGB", (200, 120), "white")
        x = 20 + 130 * index / max(1, count - 1)
        ImageDraw.Draw(picture).ellipse((x, 40, x + 40, 80), fill="blue")
        frames.append(picture)
    return frames


PICTURES = {
    "two_shapes": two_shapes,
    "red_square": red_square,
    "green_triangle": green_triangle,
    "three_stars": three_stars,
    "word": word,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().save(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
