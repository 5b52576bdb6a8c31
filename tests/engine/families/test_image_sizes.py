"""Rows of images of thousands of sizes: as many as Transformers' processors say, without any pixels.

Processors and towers have the sizes of public models. ``test_prepared_images.py`` compares pixels.
"""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from benchmarks.shapes import SHAPES, Shape, write_configuration
from engine.errors import InvalidRequest
from tests.engine.families.colpali import ROWS as COLPALI_ROWS
from tests.engine.families.colpali import make_colpali
from tests.engine.families.opened import media_processor

COUNT = 2000
EDGES = [
    *((1, 1), (1, 2), (2, 1), (3, 3), (1, 4000), (4000, 1), (4000, 30), (30, 4000), (4000, 4000), (14, 14)),
    *((28, 28), (27, 29), (196, 1), (1, 200), (200, 1), (201, 1), (5600, 28), (336, 336), (337, 336)),
    *((448, 448), (672, 672), (384, 384), (385, 384), (896, 896), (1540, 1540), (1541, 1539), (3000, 2000)),
]


def sizes(seed: str) -> Iterator[tuple[int, int]]:
    """Sizes ``(width, height)``: the edges, and drawn ones of which as many are small as large."""
    draw = random.Random(seed)
    yield from EDGES
    for _ in range(COUNT):
        width, height = (round(math.exp(draw.uniform(0, math.log(4000)))) for _ in range(2))
        yield width, height


def _pil(family: str, name: str) -> Any:
    module = f"transformers.models.{family}.image_processing_pil_{family}"
    return getattr(importlib.import_module(module), f"{name}ImageProcessorPil")


#: The rows of an image of ``(width, height)`` pixels; a ValueError where the processor refuses the size.
Rows = Callable[[int, int], int]


def patches(family: str, name: str, merge: int) -> Callable[[Path], Rows]:
    """Of processors that know the number of patches, ``merge`` of which become a row."""

    def made(path: Path) -> Rows:
        processor = _pil(family, name).from_pretrained(path)
        return lambda width, height: processor.get_number_of_image_patches(height, width, {}) // merge

    return made


def crops(family: str, name: str, rows: int) -> Callable[[Path], Rows]:
    """Of processors that know the number of crops, of ``rows`` rows each."""

    def made(path: Path) -> Rows:
        processor = _pil(family, name).from_pretrained(path)

        def of(width: int, height: int) -> int:
            found = processor.get_number_of_image_patches(height, width, {})
            return rows * (found[0] if isinstance(found, tuple) else found)

        return of

    return made


def llava_next(path: Path) -> Rows:
    module = importlib.import_module("transformers.models.llava_next.processing_llava_next")
    images = transformers.LlavaNextImageProcessorPil.from_pretrained(path)
    vision = json.loads((path / "config.json").read_text())["vision_config"]
    theirs = object.__new__(module.LlavaNextProcessor)
    theirs.image_processor, theirs.patch_size = images, vision["patch_size"]
    theirs.num_additional_image_tokens = 0
    side = vision["image_size"]
    return lambda width, height: theirs._get_number_of_features(height, width, side, side)


def squares(patch: int) -> Callable[[Path], Rows]:
    """Of Pixtral's images in squares of ``patch`` pixels, without the tokens that end lines."""

    def made(path: Path) -> Rows:
        module = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        longest = transformers.PixtralImageProcessorPil.from_pretrained(path).size["longest_edge"]

        def rows(width: int, height: int) -> int:
            image = np.broadcast_to(np.uint8(0), (height, width, 3))
            sides = module.get_resize_output_image_size(
                image, (longest, longest), (patch, patch), "channels_last"
            )
            if not min(sides):
                raise ValueError("Pillow makes no images without height or width")
            high, wide = (side // 28 for side in sides)
            if not high * wide:
                raise ValueError("the image has no rows")
            return high * wide

        return rows

    return made


def ovis2(path: Path) -> Rows:
    """With the tokens between tiles, which the tower's table has too."""
    module = importlib.import_module("transformers.models.ovis2.image_processing_pil_ovis2")
    theirs = SimpleNamespace(image_seq_length=256)

    def rows(width: int, height: int) -> int:
        columns, lines = module.get_min_tile_covering_grid((height, width), 448, 9)
        grids = {"grids": np.array([[lines, columns]])}
        return transformers.Ovis2Processor.replace_image_token(theirs, grids, 0).count("<")

    return rows


def gemma3(path: Path) -> Rows:
    images = _pil("gemma3", "Gemma3").from_pretrained(path)

    def rows(width: int, height: int) -> int:
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        return 256 * (1 + len(images.pan_and_scan(image, 256, 4, 1.2)))

    return rows


def constant(rows: int) -> Callable[[Path], Rows]:
    return lambda path: lambda width, height: rows


_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4}


@dataclass(frozen=True)
class Row:
    """A model's files, and Transformers' count.

    Attributes:
        options: of our processor.
    """

    make: Callable[[Path], object]
    theirs: Callable[[Path], Rows]
    options: SimpleNamespace | None = None


def _public(name: str, architecture: str = "", **changed: Any) -> Callable[[Path], None]:
    """The files of a public model; fields named as those of :class:`Shape` are changed."""

    def make(path: Path) -> None:
        shape: Shape = SHAPES[name]
        for field, values in changed.items():
            shape = replace(shape, **{field: {**getattr(shape, field), **values}})
        if architecture:
            shape = replace(shape, config={**shape.config, "architectures": [architecture]})
        write_configuration(shape, path)

    return make


_PINPOINTS = [
    [384 * rows, 384 * columns] for rows in range(1, 11) for columns in range(1, 11) if rows * columns <= 10
]
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "patch_size": 14}
_GRANITE = {
    "vision_config": {
        **_SIGLIP,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
    "vision_feature_layer": [-24, -20, -12, -1],
    "vision_feature_select_strategy": "full",
    "image_grid_pinpoints": _PINPOINTS,
}
_GRANITE_IMAGES = {
    "size": {"height": 384, "width": 384},
    "crop_size": {"height": 384, "width": 384},
    "image_grid_pinpoints": _PINPOINTS,
}
_COLQWEN2 = {"min_pixels": 4 * 28 * 28, "max_pixels": 768 * 28 * 28}

ROWS = {
    "LLaVA-NeXT": Row(_public("llava-next-7b"), llava_next),
    "Granite Vision": Row(
        _public("llava-next-7b", config=_GRANITE, preprocessor=_GRANITE_IMAGES), llava_next
    ),
    "InternVL": Row(_public("internvl3-2b"), crops("got_ocr2", "GotOcr2", 256)),
    "Mistral3": Row(_public("mistral-small-3.1-24b"), squares(28)),
    "LightOnOCR": Row(_public("lighton-ocr-1b"), squares(14)),
    "PaddleOCR-VL": Row(_public("paddleocr-vl-0.9b"), patches("paddleocr_vl", "PaddleOCRVL", 4)),
    "Gemma 3": Row(_public("gemma-3-4b"), constant(256)),
    "Gemma 3, pan and scan": Row(_public("gemma-3-4b"), gemma3, SimpleNamespace(**_SCAN)),
    "GLM-4.1V": Row(_public("glm-4.1v-9b"), patches("glm4v", "Glm4v", 4)),
    "GLM-4.6V": Row(_public("glm-4.1v-9b", "Glm46VForConditionalGeneration"), patches("glm46v", "Glm46V", 4)),
    "Ovis2": Row(_public("ovis2-2b"), ovis2),
    "SmolVLM": Row(_public("smolvlm2-2.2b"), crops("smolvlm", "SmolVLM", 81)),
    "Qwen3.5": Row(_public("qwen3.5-4b"), patches("qwen2_vl", "Qwen2VL", 4)),
    "Qwen3-VL-MoE": Row(_public("qwen3-vl-30b-a3b"), patches("qwen2_vl", "Qwen2VL", 4)),
    "ColQwen2": Row(_public("qwen2-vl-2b", preprocessor=_COLQWEN2), patches("qwen2_vl", "Qwen2VL", 4)),
    "ColPali": Row(lambda path: make_colpali(path, False), constant(COLPALI_ROWS)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_as_many_as_transformers_says(tmp_path, name):
    row = ROWS[name]
    row.make(tmp_path)
    ours = media_processor(tmp_path, **vars(row.options or SimpleNamespace()))
    theirs = row.theirs(tmp_path)
    different = set()
    for size in sizes(name):
        try:
            expected: Any = theirs(*size)
        except (ValueError, ZeroDivisionError):
            expected = None
        try:
            found: Any = ours.check(size)
        except InvalidRequest:
            found = None
        assert found == expected, (size, found, expected)
        different.add(found)
    assert len(different) > 3 or different == {theirs(9, 9)}
