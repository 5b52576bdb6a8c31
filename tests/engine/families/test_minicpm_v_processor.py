"""MiniCPM-V's slices against the published arithmetic, and against the later version in Transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup
from engine.errors import InvalidRequest
from engine.families.minicpm_v.config import pieces
from engine.families.minicpm_v.family import FAMILY
from engine.inputs.embeds import given_embeddings
from engine.layers.build import BuildContext
from engine.vision.normalisation import HALF_NORMALISATION
from engine.vision.pixels import PixelInput
from tests.engine.families import minicpm_v_reference as composed
from tests.engine.tiny import TRANSFORMERS, picture, rewrite_json

SIZES = [
    *[(448, 448), (449, 448), (448, 449), (1344, 1344), (600, 600), (640, 480), (480, 641), (1920, 1080)],
    *[(1, 1), (2, 1), (1, 3), (15, 16), (4000, 30), (30, 4000), (3000, 20), (1000, 1000), (700, 500)],
    *[(333, 777), (1601, 401), (350, 350), (5000, 4000), (1, 201), (700, 2), (3, 9000), (20000, 30)],
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """The processor with the public checkpoint's numbers."""
    path = composed.make(tmp_path_factory.mktemp("public"), patch_size=14)
    rewrite_json(
        path / "config.json", {"query_num": 64, "vision_config": {**composed.VISION, "patch_size": 14}}
    )
    change = {"scale_resolution": 448, "patch_size": 14, "image_feature_size": 64}
    rewrite_json(path / "preprocessor_config.json", change)
    checkpoint = Checkpoint.open(str(path))
    return FAMILY.media_processor(checkpoint, FAMILY.parse(checkpoint), {})


def encoder_pixels(media) -> torch.Tensor:
    """Return the pixels as the encoder normalises them."""
    build = BuildContext(torch.device("cpu"), torch.float32, SingleProcessGroup())
    pixels = PixelInput(HALF_NORMALISATION, build)
    return pixels(pixels.to_device(media.pixels))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_slices_are_those_of_the_published_arithmetic(processor, size):
    image = picture(*size)
    parts, grid = composed.cut(image, 448, 14)
    media = processor.prepare(image)
    columns, rows = grid or (0, 0)
    assert media.item.grid[2:4] == (rows, columns)
    assert pieces(media.item.grid) == [(part.height // 14, part.width // 14) for part in parts]
    assert media.item.num_tokens == processor.check(size) == 64 * len(parts)
    unfold = torch.nn.functional.unfold
    theirs = torch.cat([unfold(composed.normalised(part)[None], 14, stride=14)[0].T for part in parts])
    normalised = encoder_pixels(media)
    torch.testing.assert_close(normalised, theirs, atol=0, rtol=0)


@pytest.mark.skipif(
    TRANSFORMERS < (5, 23),
    reason="earlier versions of Transformers don't have it, or slice otherwise",
)
@pytest.mark.parametrize("size", [size for size in SIZES if max(size) <= 2000], ids=str)
def test_slices_are_those_of_the_later_version_in_transformers(processor, size):
    """Version 4.6 slices alike, but to multiples of two patches: half as large ones make up for that."""
    later = transformers.MiniCPMV4_6ImageProcessorPil(
        patch_size=7, downsample_mode="4x", image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image = picture(*size)
    theirs = later(image, return_tensors="pt")
    media = processor.prepare(image)
    assert [tuple(row) for row in (theirs["target_sizes"] // 2).tolist()] == pieces(media.item.grid)
    assert list(media.item.grid[2:4]) == list(theirs["grids"][0])
    ours, start = encoder_pixels(media).unflatten(1, (3, 14, 14)), 0
    for height, width in pieces(media.item.grid):
        flat = theirs["pixel_values"][0, :, :, start * 28 : (start + height * width) * 28]
        # channel, row in patch, patch row, patch column, column in patch
        whole = flat.unflatten(2, (2 * height, 2 * width, 7)).permute(0, 2, 1, 3, 4).flatten(3).flatten(1, 2)
        part = ours[start : start + height * width].unflatten(0, (height, width))
        torch.testing.assert_close(
            part.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2), whole, atol=1e-6, rtol=0
        )
        start += height * width


def test_an_item_is_described_by_the_size_of_its_image(processor):
    for size in [(640, 480), (20, 24), (1500, 240)]:
        prepared = processor.prepare(picture(*size)).item
        assert processor.embedding_item(size, "").num_tokens == prepared.num_tokens
        assert processor.embedding_item(size, prepared.hash) == prepared
    for description, words in (((0, 201), "positive"), ((1, 2, 3), "image_size_list"), ((), "width")):
        rows = {"image_embeds": torch.zeros(1, 64, 4), "image_size_list": [description]}
        with pytest.raises(InvalidRequest, match=words):
            given_embeddings(rows, processor)
