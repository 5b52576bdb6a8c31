"""Qwen3.5-MoE: Qwen3.5 whose layers all have a mixture of experts, with a shared expert behind a gate."""

from __future__ import annotations

from dataclasses import replace

from engine.families.qwen2_vl.config import qwen_text
from engine.families.qwen3_5.family import FAMILY as QWEN3_5

FAMILY = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForConditionalGeneration",),
    reader=replace(QWEN3_5.reader, text=qwen_text("qwen3_5_moe_text", text_may_tie=False)),
)
