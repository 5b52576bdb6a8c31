"""Images as the encoder normalises and cuts them into patches: bit for bit those of Transformers' processors.

A row of the table is a checkpoint with options of its processor; each is shown images of all its sizes, and
of drawn ones: ``DRAWN_SIZES=2000 python -m pytest tests/engine/families/test_prepared_images.py`` draws 2000.
``test_image_sizes.py`` compares numbers of rows for thousands of sizes.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from engine.errors import InvalidRequest
from engine.families.base import MediaProcessor, PromptAwareProcessor
from tests.engine.families.aya_vision import PATCH as AYA_PATCH
from tests.engine.families.aya_vision import image_processor as image_processor_of_aya
from tests.engine.families.aya_vision import make_aya_vision
from tests.engine.families.colpali import make_colpali
from tests.engine.families.deepseek_vl import PATCH as DEEPSEEK_VL_PATCH
from tests.engine.families.deepseek_vl import make_deepseek_vl
from tests.engine.families.ernie4_5_vl import image_processor as image_processor_of_ernie
from tests.engine.families.ernie4_5_vl import make_ernie4_5_vl
from tests.engine.families.gemma3 import PATCH as GEMMA3_PATCH
from tests.engine.families.gemma3 import Gemma3Reference, make_gemma3
from tests.engine.families.glm import GlmReference, make_glm
from tests.engine.families.got_ocr2 import PATCH as GOT_PATCH
from tests.engine.families.got_ocr2 import GotReference, make_got_ocr2
from tests.engine.families.hunyuan_vl import image_processor as image_processor_of_hunyuan
from tests.engine.families.hunyuan_vl import make_hunyuan_vl
from tests.engine.families.idefics import PATCH as IDEFICS_PATCH
from tests.engine.families.idefics import image_processor, make_idefics3, make_smolvlm
from tests.engine.families.internvl import PATCH as INTERNVL_PATCH
from tests.engine.families.internvl import InternVLReference, make_internvl
from tests.engine.families.lfm3_vl import make_lfm3_vl
from tests.engine.families.llava_next import PATCH as LLAVA_NEXT_PATCH
from tests.engine.families.llava_next import make_llava_next
from tests.engine.families.llava_variants import image_processor_class, make_llava_variant
from tests.engine.families.muse_glimmer import HAS_MUSE_GLIMMER, make_muse_glimmer
from tests.engine.families.muse_glimmer import image_processor_of as image_processor_of_muse
from tests.engine.families.onevision import PATCH as ONEVISION_PATCH
from tests.engine.families.onevision import make_onevision
from tests.engine.families.opened import encoder, media_processor
from tests.engine.families.ovis2 import PATCH as OVIS2_PATCH
from tests.engine.families.ovis2 import image_processor as image_processor_of_ovis2
from tests.engine.families.ovis2 import make_ovis2
from tests.engine.families.paddleocr_vl import make_paddleocr_vl
from tests.engine.families.paligemma import make_paligemma
from tests.engine.families.pixtral_squares import SquaresReference, make_lighton_ocr, make_mistral3
from tests.engine.families.qwen import make_qwen2_5_vl, make_qwen3_vl
from tests.engine.tiny import make_llava, make_qwen2_vl, picture

#: Of a checkpoint, images and options: patches ``(N, numbers)``, and each image's grid or the end of it.
Patches = tuple[torch.Tensor, list[tuple[int, ...]]]
Theirs = Callable[[Path, Sequence[Image.Image], Mapping[str, Any]], Patches]

SIZES = ((60, 44), (44, 60), (1, 1), (2, 1), (29, 97), (641, 480), (4000, 30), (30, 4000))
SQUARE = (*SIZES, (30, 30), (31, 30), (201, 1), (3, 2000))
TILED = ((60, 44), (44, 60), (1, 1), (2, 1), (32, 32), (96, 96), (29, 97), (200, 180), (4000, 30), (30, 4000))
CROPPED = (*SIZES, (32, 32), (64, 64), (33, 64))
NATIVE = (
    *[(60, 44), (1, 1), (1, 13), (8, 8), (7, 1000), (199, 1), (4000, 30), (30, 4000), (333, 334), (64, 64)],
    *[(20, 20), (12, 12), (1001, 777), (33, 90), (16, 120)],
)


def unfolded(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches of normalised images ``(N, 3, height, width)``, row by row."""
    return torch.nn.functional.unfold(pixels.float(), patch, stride=patch).transpose(1, 2).flatten(0, 1)


@cache
def _gemma3_processor(path: Path) -> Any:
    return Gemma3Reference(path).processor


@cache
def _glm_processor(path: Path) -> Any:
    return GlmReference(path, "Glm4v").images


@cache
def _got_processor(path: Path) -> Any:
    return GotReference(path).processor


_internvl_processor = cache(InternVLReference.processor_of)
_squares_processor = cache(SquaresReference.processor_of)


def llava(
    path: Path, images: Sequence[Image.Image], options: Mapping[str, Any], kind: str = "CLIP"
) -> Patches:
    processor = image_processor_class(kind).from_pretrained(path)
    return unfolded(processor(images, return_tensors="pt", **options)["pixel_values"], 7), [(1,)]


def deepseek_vl(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = transformers.DeepseekVLImageProcessorPil.from_pretrained(path)(images, return_tensors="pt")
    return unfolded(torch.as_tensor(made["pixel_values"]), DEEPSEEK_VL_PATCH), [(1,)]


def muse_glimmer(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = image_processor_of_muse(path)(list(images), return_tensors="pt", **options)
    (grid,) = made["image_grid_thw"].tolist()
    # Frames come before colours there, and patches of a merged square are not neighbours.
    patches = made["pixel_values"].unflatten(1, (2, 3, -1)).transpose(1, 2).flatten(1)
    t, h, w = grid
    squares = patches.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).flatten(0, 3)
    return squares, [(t, h, w)]


def pixtral(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = transformers.PixtralImageProcessorPil.from_pretrained(path)(images, return_tensors="pt", **options)
    ((height, width),) = torch.as_tensor(made["image_sizes"]).tolist()
    return unfolded(torch.as_tensor(made["pixel_values"]), 8), [(1, height // 8, width // 8)]


def internvl(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    processor = _internvl_processor(path).image_processor
    made = processor(list(images), return_tensors="pt", **{"crop_to_patches": True, **options})
    return unfolded(torch.as_tensor(made["pixel_values"]), INTERNVL_PATCH), []


def ovis2(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = image_processor_of_ovis2().from_pretrained(path)(list(images), return_tensors="pt", **options)
    (grid,) = made["grids"].tolist()
    grids = [tuple(grid)] if grid != [1, 1] else [(1, 0, 0)]
    return unfolded(torch.as_tensor(made["pixel_values"]), OVIS2_PATCH), grids


def command_a_vision(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = image_processor_of_aya(path, "Cohere2Vision")(list(images), return_tensors="pt", **options)
    return unfolded(made["pixel_values"], AYA_PATCH), []


def gemma3(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = _gemma3_processor(path)(
        text="<start_of_image>", images=list(images), return_tensors="pt", **options
    )
    return unfolded(made["pixel_values"], GEMMA3_PATCH), [(len(made["pixel_values"]),)]


def pixtral_squares(
    path: Path, images: Sequence[Image.Image], options: Mapping[str, Any], kind: str
) -> Patches:
    processor = _squares_processor(path, kind)
    made = processor(text=processor.image_token, images=list(images), return_tensors="pt")
    ((height, width),) = torch.as_tensor(made["image_sizes"]).tolist()
    return unfolded(torch.as_tensor(made["pixel_values"]), 8), [(1, height // 8, width // 8)]


def onevision(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)
    pixels = processor([list(images)], return_tensors="pt", **options)["pixel_values"]
    return unfolded(pixels.flatten(0, 1), ONEVISION_PATCH), []


def llava_next(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    processor = transformers.LlavaNextImageProcessorPil.from_pretrained(path)
    pixels = processor(list(images), return_tensors="pt", **options)["pixel_values"]
    return unfolded(torch.as_tensor(pixels).flatten(0, 1), LLAVA_NEXT_PATCH), []


def idefics(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any], kind: str) -> Patches:
    processor = image_processor(path, kind)
    made = processor(list(images), return_tensors="pt", return_row_col_info=True, **options)
    assert not torch.any(made["pixel_attention_mask"] == 0)
    patches = unfolded(made["pixel_values"].flatten(0, 1), IDEFICS_PATCH)
    return patches, [(made["rows"][0][0], made["cols"][0][0])]


def qwen(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    made = processor(list(images), return_tensors="pt", **options)
    return made["pixel_values"], [tuple(grid) for grid in made["image_grid_thw"].tolist()]


def glm(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = _glm_processor(path)(list(images), return_tensors="pt")
    return torch.as_tensor(made["pixel_values"]), [tuple(grid) for grid in made["image_grid_thw"].tolist()]


def got_ocr2(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    processor = _got_processor(path)
    made = processor(list(images), text="<imgpad>", return_tensors="pt", **options)
    return unfolded(torch.as_tensor(made["pixel_values"]), GOT_PATCH), []


def paddleocr_vl(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    return _by_lines(transformers.PaddleOCRVLImageProcessorPil.from_pretrained(path), images)


def hunyuan_vl(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    return _by_lines(image_processor_of_hunyuan().from_pretrained(path), images)


def ernie4_5_vl(path: Path, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Patches:
    made = image_processor_of_ernie().from_pretrained(path)(list(images), return_tensors="pt")
    return torch.as_tensor(made["pixel_values"]), [tuple(grid) for grid in made["image_grid_thw"].tolist()]


def _by_lines(processor: Any, images: Sequence[Image.Image]) -> Patches:
    """Patches come line by line; the encoder takes them square by square of 2x2."""
    made = processor(images, return_tensors="pt")
    ((_, h, w),) = made["image_grid_thw"].tolist()
    lines = torch.as_tensor(made["pixel_values"]).flatten(1).view(h // 2, 2, w // 2, 2, -1)
    return lines.transpose(1, 2).flatten(0, 3), [(1, h, w)]


@dataclass(frozen=True)
class Row:
    """A checkpoint, the sizes of its images, and Transformers' processor.

    Attributes:
        count: images of a prompt.
        options: of the processor.
        draws: further sizes are drawn.
    """

    make: Callable[[Path], object]
    sizes: Sequence[tuple[int, int]]
    theirs: Theirs
    count: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = True


def _idefics(kind: str, **options: Any) -> Row:
    make = {"Idefics3": make_idefics3, "SmolVLM": make_smolvlm}[kind]
    return Row(make, CROPPED, partial(idefics, kind=kind), options=options)


def _llava(kind: str, **fields: Any) -> Row:
    return Row(partial(make_llava_variant, processor=kind, **fields), SQUARE, partial(llava, kind=kind))


def _squares(make: Callable[[Path], object], kind: str) -> Row:
    sizes = [(60, 44), (44, 60), (29, 97), (641, 480), (17, 16), (96, 96), (97, 95), (500, 90), (33, 340)]
    return Row(make, sizes, partial(pixtral_squares, kind=kind))


def _changed(make: Callable[[Path], object], path: Path, **fields: Any) -> None:
    """Make a checkpoint, and change fields of its preprocessor_config.json; None removes one."""
    make(path)
    file = path / "preprocessor_config.json"
    stated = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in stated.items() if value is not None}))


def _with(row: Row, **fields: Any) -> Row:
    sizes = [size for size in row.sizes if max(size) < 1000]
    return replace(row, make=partial(_changed, row.make, **fields), sizes=sizes, draws=False)


def _respelled(make: Callable[[Path], object], path: Path, form: Callable[[int], Any]) -> None:
    """Make a checkpoint, and state its processor's size as in files of early releases."""
    make(path)
    (side,) = set(json.loads((path / "preprocessor_config.json").read_text())["size"].values())
    _changed(lambda _: None, path, size=form(side), image_mean=0.4)


def _early(row: Row, form: Callable[[int], Any]) -> Row:
    return replace(row, make=partial(_respelled, row.make, form=form), sizes=row.sizes[:4], draws=False)


ROWS = {
    "LLaVA": Row(make_llava, SQUARE, partial(llava, kind="CLIP")),
    "LLaVA, padded": _llava("Llava"),
    "LLaVA, cropped": _llava("CLIP", size={"shortest_edge": 41}),
    "LLaVA, cropped out of a smaller image": _llava("CLIP", size={"shortest_edge": 23}),
    "LLaVA, not resized": Row(
        partial(make_llava_variant, do_resize=False),
        [size for size in SQUARE if max(size) < 1000],
        partial(llava, kind="CLIP"),
    ),
    "LLaVA, SigLIP": _llava("Siglip", tower="siglip"),
    "LLaVA, bilinear": _llava("CLIP", resample=2),
    "LLaVA, Pixtral": Row(
        partial(make_llava_variant, tower="pixtral", processor="Pixtral"),
        [size for size in SIZES if max(size) < 64 * min(size)],
        pixtral,
    ),
    "LLaVA-NeXT": Row(make_llava_next, TILED, llava_next),
    "LLaVA-NeXT, hub": Row(partial(make_llava_next, hub=True), TILED, llava_next),
    "Mistral3": _squares(make_mistral3, "Mistral3"),
    "LightOnOCR": _squares(make_lighton_ocr, "LightOnOcr"),
    "LightOnOCR, squares of its own": _squares(partial(make_lighton_ocr, patch=16), "LightOnOcr"),
    "ColPali": Row(partial(make_colpali, hub=False), SQUARE, partial(llava, kind="Siglip")),
    "PaliGemma": Row(partial(make_paligemma, hub=False), SQUARE, partial(llava, kind="Siglip")),
    "Gemma 3": Row(make_gemma3, SQUARE, gemma3),
    "Gemma 3, hub": Row(partial(make_gemma3, hub=True), SQUARE, gemma3),
    "Gemma 3, pan and scan": Row(
        make_gemma3, TILED, gemma3, options={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
    ),
    "GLM-4.1V": Row(make_glm, NATIVE, glm),
    "GLM-4.1V, hub": Row(partial(make_glm, hub=True), NATIVE, glm),
    "InternVL": Row(make_internvl, TILED, internvl),
    "InternVL, hub": Row(partial(make_internvl, hub=True), TILED, internvl),
    "InternVL, in one crop": Row(make_internvl, TILED, internvl, options={"crop_to_patches": False}),
    "InternVL, up to 3 tiles": Row(make_internvl, TILED, internvl, options={"max_patches": 3}),
    # Its only processor normalises by torchvision, in another order of roundings.
    "Command A Vision, as it is": Row(
        partial(
            make_aya_vision, kind="Cohere2Vision", processor={"do_normalize": False, "do_rescale": False}
        ),
        TILED,
        command_a_vision,
    ),
    "LLaVA-OneVision": Row(make_onevision, TILED, onevision),
    "LLaVA-OneVision, several": Row(make_onevision, TILED, onevision, count=2),
    "LLaVA-OneVision, hub": Row(partial(make_onevision, hub=True), TILED, onevision),
    "LLaVA-OneVision, several, hub": Row(partial(make_onevision, hub=True), TILED, onevision, count=2),
    "Ovis2": Row(make_ovis2, TILED, ovis2),
    "Ovis2, hub": Row(partial(make_ovis2, hub=True), TILED, ovis2),
    "Ovis2, in one crop": Row(make_ovis2, TILED, ovis2, options={"crop_to_patches": False}),
    "Ovis2, up to 12 tiles": Row(make_ovis2, TILED, ovis2, options={"max_patches": 12}),
    "Ovis2, by aspect ratio": Row(
        partial(make_ovis2, processor={"use_covering_area_grid": False, "min_patches": 2}), TILED, ovis2
    ),
    "Idefics3": _idefics("Idefics3"),
    "Idefics3, whole": _idefics("Idefics3", do_image_splitting=False),
    "Idefics3, larger": _idefics("Idefics3", size={"longest_edge": 100}),
    "SmolVLM": _idefics("SmolVLM"),
    "SmolVLM, whole": _idefics("SmolVLM", do_image_splitting=False),
    "SmolVLM, larger": _idefics("SmolVLM", size={"longest_edge": 100}),
    "GOT-OCR 2": Row(make_got_ocr2, SQUARE, got_ocr2),
    "GOT-OCR 2, hub": Row(partial(make_got_ocr2, hub=True), SQUARE, got_ocr2),
    "GOT-OCR 2, in tiles": Row(
        make_got_ocr2, TILED, got_ocr2, options={"crop_to_patches": True, "max_patches": 6}
    ),
    "DeepSeek-VL": Row(make_deepseek_vl, SQUARE, deepseek_vl),
    "DeepSeek-VL, no least side": Row(partial(make_deepseek_vl, min_size=1), SQUARE, deepseek_vl),
    "ERNIE 4.5 VL": Row(make_ernie4_5_vl, NATIVE, ernie4_5_vl),
    "HunyuanOCR": Row(partial(make_hunyuan_vl, hub=False), NATIVE, hunyuan_vl),
    "HunyuanOCR, hub": Row(partial(make_hunyuan_vl, hub=True), NATIVE, hunyuan_vl),
    "PaddleOCR-VL": Row(partial(make_paddleocr_vl, hub=False), NATIVE, paddleocr_vl),
    "PaddleOCR-VL, hub": Row(partial(make_paddleocr_vl, hub=True), NATIVE, paddleocr_vl),
    "LFM3-VL": Row(make_lfm3_vl, NATIVE, qwen),
    "Qwen2-VL": Row(make_qwen2_vl, NATIVE, qwen),
    "Qwen2.5-VL": Row(make_qwen2_5_vl, NATIVE, qwen),
    "Qwen3-VL": Row(make_qwen3_vl, NATIVE, qwen),
}
ROWS |= {
    f"{name}, {what}": _with(ROWS[name], **fields)
    for what, fields in {
        "not normalised": {"do_normalize": False},
        "not rescaled": {"do_rescale": False},
        "as it is": {"do_normalize": False, "do_rescale": False},
    }.items()
    for name in (
        "LLaVA, SigLIP",
        "LLaVA, padded",
        "LLaVA, Pixtral",
        "LLaVA-NeXT",
        "LLaVA-OneVision",
        "Idefics3",
        "Qwen2-VL",
    )
}
if HAS_MUSE_GLIMMER:
    ROWS["Muse Glimmer"] = Row(make_muse_glimmer, NATIVE, muse_glimmer)
ROWS |= {
    "LLaVA, the crop's size alone": _with(ROWS["LLaVA, cropped"], size=None),
    # Its size is then 1456: images become large.
    "Idefics3, no size": replace(_with(ROWS["Idefics3"], size=None), sizes=[(60, 44), (29, 97)]),
    "Qwen2-VL, no least area": _with(
        Row(make_qwen2_vl, NATIVE, qwen), size=None, min_pixels=None, max_pixels=2048
    ),
    "Qwen2-VL, no areas": _with(
        Row(make_qwen2_vl, NATIVE[:4], qwen), size=None, min_pixels=None, max_pixels=None
    ),
}


ROWS |= {
    f"{name}, size {what}": _early(ROWS[name], form)
    for what, form in {"a number": lambda side: side, "a pair": lambda side: [side, side]}.items()
    for name in ("LLaVA, Pixtral", "LLaVA-NeXT", "LLaVA-OneVision, hub", "InternVL, hub", "Gemma 3, hub")
}


def drawn(name: str) -> Iterator[tuple[int, int]]:
    """Sizes ``(width, height)`` up to 500, of which as many are small as large, none too elongated."""
    draw = random.Random(name)
    for _ in range(int(os.environ.get("DRAWN_SIZES", 3))):
        width = round(math.exp(draw.uniform(0, math.log(500))))
        yield width, min(500, math.ceil(width * math.exp(draw.uniform(-2, 2))))


def _is_shown(processor: MediaProcessor, size: tuple[int, int]) -> bool:
    """Return whether the model can be shown an image of this size."""
    try:
        processor.check(size)
    except InvalidRequest:
        return False
    return True


@pytest.mark.parametrize("name", ROWS)
def test_patches_are_those_of_transformers(tmp_path, name):
    row = ROWS[name]
    row.make(tmp_path)
    ours, vision = media_processor(tmp_path, **row.options), encoder(tmp_path)
    if isinstance(ours, PromptAwareProcessor):
        ours = ours.among(row.count)
    # The crops of images in tiles are those of an encoder within theirs.
    patchify = getattr(vision, "crops", vision).patchify
    further = [size for size in drawn(name) if _is_shown(ours, size)] if row.draws else []
    for size in (*row.sizes, *further):
        images = [picture(*size, seed) for seed in range(row.count)]
        theirs, grids = row.theirs(tmp_path, images, row.options)
        media = [ours.prepare(image) for image in images]
        for entry, grid in zip(media, grids, strict=False):
            assert entry.item.grid[-len(grid) :] == grid, size
        assert all(entry.item.num_tokens == ours.check(size) for entry in media), size
        assert all(entry.pixels.dtype == np.uint8 for entry in media)
        patches = torch.cat([patchify(torch.from_numpy(entry.pixels.copy())) for entry in media])
        assert torch.equal(patches, theirs), size
