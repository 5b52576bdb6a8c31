"""MiniCPM-OCR: MiniCPM-V 4.6 that keeps four times as many rows, and may keep small images as they are.

The option ``small_image_upsize`` says whether images of less than a square's area are enlarged to it.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.minicpm_v4_6.config import MergedVisionConfig
from engine.families.minicpm_v4_6.family import FAMILY as MINICPM_V4_6
from engine.families.minicpm_v4_6.processor import MiniCPMV46Processor
from engine.families.parsing.fields import Json
from engine.families.parsing.model import nested_text, tied_unless_stated

_MODE = "4x"


def _vision(raw: Json, processor: Json, hidden: int) -> MergedVisionConfig:
    assert MINICPM_V4_6.reader.vision is not None
    return MINICPM_V4_6.reader.vision({"downsample_mode": _MODE, **raw}, processor, hidden)


FAMILY = replace(
    MINICPM_V4_6,
    name="minicpm_ocr",
    architectures=("MiniCPMOcrForConditionalGeneration",),
    reader=replace(
        MINICPM_V4_6.reader,
        text=tied_unless_stated(nested_text("qwen3_5_text", text_may_tie=False)),
        vision=_vision,
    ),
    processor=MiniCPMV46Processor.with_defaults(downsample_mode=_MODE, small_image_upsize="always"),
    options=("max_slice_nums", "small_image_upsize"),
)
