"""All families that cases are drawn of, by name."""

from __future__ import annotations

from tests.engine.families.drawn.aya_vision import AyaVisionFamily
from tests.engine.families.drawn.checkpoint import Family
from tests.engine.families.drawn.composed import MiniCPMVFamily, Phi3VFamily
from tests.engine.families.drawn.deepseek_ocr2 import DeepseekFamily
from tests.engine.families.drawn.deepseek_vl import DeepseekVLFamily
from tests.engine.families.drawn.ernie4_5_vl import ErnieFamily
from tests.engine.families.drawn.gemma3 import Gemma3Family
from tests.engine.families.drawn.gemma4 import Gemma4Family
from tests.engine.families.drawn.glm import GlmFamily
from tests.engine.families.drawn.got_ocr2 import GotFamily
from tests.engine.families.drawn.granite4_vision import Granite4VisionFamily
from tests.engine.families.drawn.granite_docling import GraniteDoclingFamily
from tests.engine.families.drawn.hunyuan_vl import HunyuanFamily
from tests.engine.families.drawn.idefics import IdeficsFamily
from tests.engine.families.drawn.internvl import InternVLChatFamily, InternVLFamily
from tests.engine.families.drawn.lfm2_vl import Lfm2VlFamily
from tests.engine.families.drawn.llava import LlavaFamily, OnevisionFamily
from tests.engine.families.drawn.llava_next import LlavaNextFamily
from tests.engine.families.drawn.minicpm_v4_6 import MiniCPMV46Family
from tests.engine.families.drawn.molmo2 import MolmoFamily
from tests.engine.families.drawn.muse_glimmer import MuseGlimmerFamily
from tests.engine.families.drawn.ovis2 import Ovis2Family
from tests.engine.families.drawn.paddleocr_vl import PaddleOCRFamily
from tests.engine.families.drawn.paligemma import PaliGemmaFamily
from tests.engine.families.drawn.qwen_vl import QwenVLFamily
from tests.engine.families.drawn.retrieval import ColPaliFamily, ColQwen2Family
from tests.engine.families.drawn.squares import SquaresFamily
from tests.engine.families.drawn.text import ARCHITECTURES, TextFamily
from tests.engine.families.drawn.video_llama_3 import VideoLlama3Family
from tests.engine.families.minicpm_v4_6 import STEMS

_ALL: tuple[Family, ...] = (
    LlavaFamily(),
    OnevisionFamily(),
    LlavaNextFamily(),
    Granite4VisionFamily(),
    *(SquaresFamily(kind) for kind in ("Mistral3", "LightOnOcr")),
    Gemma3Family(),
    *(Gemma4Family(unified) for unified in (False, True)),
    *(AyaVisionFamily(kind) for kind in ("AyaVision", "Cohere2Vision")),
    *(InternVLFamily(kind) for kind in ("InternVL", "QianfanOCR")),
    InternVLChatFamily(),
    Ovis2Family(),
    Phi3VFamily("phi3_v"),
    Phi3VFamily("vlm2vec"),
    *(
        QwenVLFamily(kind)
        for kind in (
            "Qwen2VL",
            "Qwen2_5_VL",
            "Exaone4_5_",
            "HyperCLOVAXVisionV2",
            "Lfm3Vl",
            "Qwen3VL",
            "Qwen3VLMoe",
            "Qwen3_5",
            "Qwen3_5Moe",
        )
    ),
    *(GlmFamily(kind) for kind in ("Glm4v", "Glm46V", "Glm4vMoe", "GlmOcr")),
    PaddleOCRFamily(),
    HunyuanFamily(),
    GotFamily(),
    DeepseekFamily(),
    DeepseekVLFamily(),
    ErnieFamily(),
    MolmoFamily(),
    MuseGlimmerFamily(),
    *(PaliGemmaFamily(kind) for kind in ("gemma", "gemma2")),
    ColQwen2Family(),
    ColPaliFamily(),
    MiniCPMVFamily(),
    *(MiniCPMV46Family(version) for version in STEMS),
    VideoLlama3Family(),
    Lfm2VlFamily(),
    GraniteDoclingFamily(),
    *(IdeficsFamily(kind) for kind in ("Idefics3", "SmolVLM")),
    *(TextFamily(kind) for kind in ARCHITECTURES),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
