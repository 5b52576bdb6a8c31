from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import transformers
from PIL import Image

from engine.media.image_ops import CLIP_MEAN, CLIP_STD, normalisation_table, rgb_array


def test_constants_are_those_of_clip():
    reference = transformers.CLIPImageProcessorPil()
    assert list(reference.image_mean) == list(CLIP_MEAN) and list(reference.image_std) == list(CLIP_STD)


@pytest.mark.parametrize("scale", [1 / 255, 1 / 127.5])
def test_table_gives_the_numbers_of_transformers(scale):
    from transformers.image_transforms import normalize, rescale

    every_byte = np.tile(np.arange(256, dtype=np.uint8)[None, None], (3, 1, 1))
    expected = normalize(rescale(every_byte, scale), CLIP_MEAN, CLIP_STD, input_data_format="channels_first")
    table = normalisation_table(CLIP_MEAN, CLIP_STD, scale)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, expected[:, 0])


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 7), (640, 480)])
def test_pixels_are_those_of_numpy_and_copied_once(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tracemalloc.start()
    found = rgb_array(image)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, pixels)
    assert most < pixels.nbytes + 2000 + 4 * width
    # An image that isn't read yet.
    file = io.BytesIO()
    image.save(file, "PNG")
    np.testing.assert_array_equal(rgb_array(Image.open(file)), pixels)
