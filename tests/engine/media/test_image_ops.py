from __future__ import annotations

import numpy as np
import pytest
import transformers
from PIL import Image

from engine.media.image_ops import CLIP_MEAN, CLIP_STD, content_hash, normalisation_table, resize


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


def test_resize_leaves_pictures_of_the_right_size_alone():
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    np.testing.assert_array_equal(resize(image, (5, 4), 3), np.asarray(image))
    assert resize(image, (10, 2), 3).shape == (2, 10, 3)


def test_hash_sees_everything():
    base = {"family": "f", "options": {"a": 1, "b": 2}, "kind": "image", "size": (4, 2)}
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    changed = pixels.copy()
    changed[1, 3, 2] ^= 1
    seen = {
        content_hash(pixels, **base),
        content_hash(changed, **base),
        content_hash(pixels.reshape(4, 2, 3), **base),
        content_hash(pixels.view(np.int8), **base),
        content_hash(pixels, **{**base, "family": "g"}),
        content_hash(pixels, **{**base, "options": {"a": 1, "b": 3}}),
        content_hash(pixels, **{**base, "kind": "video"}),
        content_hash(pixels, **{**base, "size": (2, 4)}),
    }
    assert len(seen) == 8
    # Neither the order of options nor the array's layout in memory is content.
    strided = np.zeros((2, 8, 3), np.uint8)[:, ::2]
    strided[...] = pixels
    same = content_hash(strided, **{**base, "options": {"b": 2, "a": 1}})
    assert same == content_hash(pixels, **base)
