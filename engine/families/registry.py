"""The families by architecture. A family is imported when it is first needed."""

from __future__ import annotations

from importlib import import_module

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.family import Family, with_head

_FAMILIES: dict[str, tuple[str, ...]] = {
    "aya_vision": ("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration"),
    "colpali": ("ColPaliForRetrieval",),
    "colqwen2": ("ColQwen2ForRetrieval",),
    "deepseek_ocr2": ("DeepseekOCR2ForCausalLM", "DeepseekOcr2ForConditionalGeneration"),
    "deepseek_vl": ("DeepseekVLForConditionalGeneration",),
    "ernie4_5_vl": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VL_MoeForConditionalGeneration",
    ),
    "exaone4_5": ("Exaone4_5_ForConditionalGeneration",),
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "gemma4": ("Gemma4ForConditionalGeneration",),
    "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration",),
    "glm4v": (
        "Glm46VForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
    ),
    "got_ocr2": ("GotOcr2ForConditionalGeneration",),
    "hunyuan_vl": ("HunYuanVLForConditionalGeneration",),
    "hyperclovax_vision_v2": (
        "HCXVisionV2ForCausalLM",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
    ),
    "granite4_vision": ("Granite4VisionForConditionalGeneration",),
    "granite_docling": ("GraniteDoclingForConditionalGeneration",),
    "idefics3": ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    "internvl": ("InternVLForConditionalGeneration", "QianfanOCRForConditionalGeneration"),
    "internvl_chat": ("InternVLChatModel",),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration",),
    "lfm3_vl": ("Lfm3VlForConditionalGeneration",),
    "lighton_ocr": ("LightOnOcrForConditionalGeneration",),
    "llava": ("LlavaForConditionalGeneration",),
    "llava_next": ("LlavaNextForConditionalGeneration",),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration",),
    "minicpm_ocr": ("MiniCPMOcrForConditionalGeneration",),
    "minicpm_v": ("MiniCPMV",),
    "minicpm_v4_6": ("MiniCPMV4_6ForConditionalGeneration",),
    "minicpm_v4_7": ("MiniCPMV4_7ForConditionalGeneration",),
    "mistral3": ("Mistral3ForConditionalGeneration",),
    "molmo2": ("Molmo2ForConditionalGeneration",),
    "muse_glimmer": ("MuseGlimmerForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "ovis2": ("Ovis2ForConditionalGeneration",),
    "paligemma": ("PaliGemmaForConditionalGeneration",),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration",),
    "phi3_v": ("Phi3VForCausalLM",),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration",),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration",),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration",),
    "text": (
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Exaone4ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma4ForCausalLM",
        "GlmForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "HyperCLOVAXForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm3ForCausalLM",
        "LlamaForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
    ),
}
"""The architectures of each folder under ``engine.families``; its ``family.py`` has the value ``FAMILY``."""


def supported_architectures() -> list[str]:
    """All entries of ``architectures`` in config.json that a family serves, sorted."""
    return sorted(name for names in _FAMILIES.values() for name in names)


def family_named(name: str) -> Family:
    """The family in the folder ``name``."""
    return import_module(f"engine.families.{name}.family").FAMILY


def resolve(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: the architecture is not supported; the message lists those that are.
    """
    for architecture in checkpoint.architectures:
        for served in with_head(architecture):
            for name, supported in _FAMILIES.items():
                if served in supported:
                    return family_named(name)
    named = ", ".join(checkpoint.architectures) or "(none named in config.json)"
    raise CheckpointError(
        f"architecture {named} is not supported; supported are {', '.join(supported_architectures())}"
    )
