"""Qwen3-VL-MoE: Qwen3-VL whose decoder has a mixture of experts; tower, prompts and videos are the same."""

from __future__ import annotations

from dataclasses import replace

from engine.families.qwen2_vl.config import qwen_text
from engine.families.qwen3_vl.family import FAMILY as QWEN3_VL

FAMILY = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    reader=replace(QWEN3_VL.reader, text=qwen_text("qwen3_vl_moe", text_may_tie=False)),
)
