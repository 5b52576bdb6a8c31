"""Pixels in Pillow's own memory."""

import gc

import numpy as np
import pytest
from PIL import Image

from engine.media.shared_pixels import packed_pixels, shared_pixels


def picture(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels), pixels


@pytest.mark.parametrize("size", [(1, 1), (37, 23), (560, 560)])
def test_they_are_those_of_the_image_for_as_long_as_they_are_held(size):
    image, pixels = picture(*size)
    shared = shared_pixels(image)
    assert shared.shape == (*pixels.shape[:2], 4) and shared.dtype == np.uint8 and not shared.flags.writeable
    del image
    gc.collect()
    # Pillow gives memory that is free to the next images.
    others = [Image.new("RGB", size, number) for number in range(20)]
    np.testing.assert_array_equal(shared[..., :3], pixels)
    packed = packed_pixels(shared)
    assert packed.flags.c_contiguous and len(others) == 20
    np.testing.assert_array_equal(packed, pixels)
    assert packed_pixels(packed) is packed


def test_they_are_not_copied():
    image, _ = picture(8, 4)
    shared = shared_pixels(image)
    image.putpixel((5, 2), (1, 2, 3))
    assert shared[2, 5, :3].tolist() == [1, 2, 3]


def test_memory_in_several_pieces_is_copied():
    size = Image.core.get_block_size()
    Image.core.set_block_size(4096)
    try:
        image, pixels = picture(64, 300)
        found = shared_pixels(image)
    finally:
        Image.core.set_block_size(size)
    assert found.shape == pixels.shape and not found.flags.writeable
    np.testing.assert_array_equal(found, pixels)
