"""The centre of a resized image against PIL's whole resized image."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.image_transforms import center_crop

from engine.media import centre
from engine.media.resize import resize
from tests.engine.tiny import picture

#: Width and height of images, and the side of the square.
ENLARGED = [(1, 1, 30), (7, 7, 30), (200, 1, 14), (1, 500, 14), (2, 900, 30), (901, 3, 14), (97, 200, 97)]


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(("width", "height", "side"), ENLARGED)
def test_a_part_is_what_the_whole_has_there(monkeypatch, width, height, side, resample):
    image, shorter = picture(width, height), min(width, height)
    size = (side * width // shorter, side * height // shorter)
    whole = centre.centre_square(resize(image, size, resample), side)
    monkeypatch.setattr(centre, "_WHOLE_PIXELS", 0)
    np.testing.assert_array_equal(centre.centre_of_resized(image, size, side, resample), whole)


def test_a_panorama_takes_little_memory():
    """Enlarged as a whole it would have 20 gigabytes."""
    image = picture(65000, 1)
    pixels = centre.centre_of_resized(image, (65000 * 336, 336), 336, 3)
    middle = np.asarray(image)[0, 32499:32501].astype(float)
    assert abs(pixels.astype(float).mean(axis=(0, 1)) - middle.mean(axis=0)).max() < 20


@pytest.mark.parametrize("size", [(9, 5), (5, 9), (4, 4), (5, 6), (20, 3), (3, 20), (8, 8), (9, 9)], ids=str)
@pytest.mark.parametrize("side", [7, 8])
def test_squares_are_cut_as_transformers_does(size, side):
    pixels = np.asarray(picture(*size))
    theirs = center_crop(pixels, (side, side), data_format="channels_last", input_data_format="channels_last")
    np.testing.assert_array_equal(centre.centre_square(pixels, side), theirs)
