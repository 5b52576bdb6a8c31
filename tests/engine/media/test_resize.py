"""Images that several threads resize against Pillow's own call."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from engine.media import resize as module
from engine.media.crew import Crew
from engine.media.resize import resize, resized


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def drawn_side(rng: random.Random) -> int:
    return rng.randint(1, rng.choice([3, 40, 400]))


def test_bands_are_pillows_bytes(monkeypatch, wide):
    monkeypatch.setattr(module, "_SHARE", 1)
    rng, shared = random.Random(0), set()
    share = Crew.share

    def counted(self, work, most):
        shared.add(most > 1)
        share(self, work, most)

    monkeypatch.setattr(Crew, "share", counted)
    crews = [Crew(size) for size in (2, 3, 8)]
    for case in range(2000 if wide else 40):
        size = drawn_side(rng), drawn_side(rng)
        to = tuple(rng.choice([old, drawn_side(rng)]) for old in size)
        image, resample = noise(size, case), rng.randrange(6)
        with rng.choice(crews).member():
            found = resize(image, to, resample)
        expected = np.asarray(image.resize(to, Image.Resampling(resample)))
        np.testing.assert_array_equal(found, expected, f"{size} to {to} by filter {resample}")
    assert shared == {True}


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((60, 900), (50, 30)),
        ((900, 60), (30, 50)),
        ((30, 90), (20, 70)),
        ((30, 90), (20, 69)),
    ],
)
def test_both_orders_of_passes(monkeypatch, size, to):
    monkeypatch.setattr(module, "_SHARE", 1)
    image = noise(size)
    expected = np.asarray(image.resize(to, Image.Resampling.BICUBIC))
    with Crew(3).member():
        np.testing.assert_array_equal(resize(image, to, 3), expected)


def test_an_image_of_the_right_size_stays():
    image = noise((5, 4))
    assert resized(image, (5, 4), 3) is image
    np.testing.assert_array_equal(resize(image, (5, 4), 3), np.asarray(image))


@pytest.mark.parametrize(("to", "shared"), [((16, 16), False), ((1536, 1536), True)])
def test_only_large_images_are_shared(monkeypatch, to, shared):
    calls = []
    monkeypatch.setattr(Crew, "share", lambda self, work, most: calls.append(most))
    with Crew(4).member():
        resized(noise((24, 24)), to, 1)
    assert bool(calls) == shared and all(most >= 2 for most in calls)
    resized(noise((24, 24)), (40, 40), 1)
    assert bool(calls) == shared, "a thread without a crew has helpers"
