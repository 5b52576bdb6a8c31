"""Resizing with padding against PIL on images that were padded for real."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from engine.media.padding import resize_in_square, resize_on_canvas
from tests.engine.tiny import picture

COLOUR = (122, 116, 104)


# The tall ones are resized in several strips.
@pytest.mark.parametrize("size", [(3000, 7), (7, 3000), (900, 3001), (40, 31), (32, 20), (5, 5)], ids=str)
@pytest.mark.parametrize("resample", [1, 2, 3])
def test_a_square_is_resized_as_if_it_had_been_made(size, resample):
    image, longest = picture(*size), max(size)
    square = np.full((longest, longest, 3), COLOUR, np.uint8)
    left, top = (longest - size[0]) // 2, (longest - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(image)
    expected = np.asarray(Image.fromarray(square).resize((32, 32), resample))
    np.testing.assert_array_equal(resize_in_square(image, 32, COLOUR, resample), expected)


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (200, 100), (64, 32)], ids=str)
def test_an_image_fills_its_canvas_in_one_direction(size):
    image = picture(*size)
    expected = ImageOps.pad(image, (64, 32), method=Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_on_canvas(image, (64, 32), 3), np.asarray(expected))


def test_a_panorama_takes_little_memory():
    """Its square would have 3.6 thousand million pixels."""
    assert resize_in_square(Image.new("RGB", (60000, 3), "red"), 32, COLOUR, 3).shape == (32, 32, 3)
