"""Checkpoint folders in the shape of public models, all but the weights: those are noise made in place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.shapes_qwen3 import QWEN3_5_4B, QWEN3_IMAGES, QWEN3_VL_30B_A3B, TINY_QWEN3_5

_QWEN2_VL: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_QWEN_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_QWEN_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}PICTURE{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_QWEN_PICTURE = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's configuration files, its special tokens, the text that stands for an image, and the size of
    the benchmark's images in pixels.

    Attributes:
        processor: processor_config.json; empty if the model has none.
        end: the special token that ends an answer.
        tokenizer: further fields of tokenizer_config.json, which other libraries' processors read.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    specials: dict[str, int]
    picture: str
    picture_size: int
    processor: dict[str, Any] = field(default_factory=dict)
    end: str = "<|im_end|>"
    tokenizer: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.config.get("text_config", self.config)["vocab_size"])


SHAPES: dict[str, Shape] = {
    "qwen2-vl-2b": Shape(
        {
            **_QWEN2_VL,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14},
        },
        _QWEN_PICTURE,
        _QWEN_SPECIALS,
        _QWEN_PLACEHOLDER,
        560,
    ),
    "qwen2-vl-7b": Shape(
        {
            **_QWEN2_VL,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
            "vision_config": {"hidden_size": 3584, "in_chans": 3, "spatial_patch_size": 14},
        },
        _QWEN_PICTURE,
        _QWEN_SPECIALS,
        _QWEN_PLACEHOLDER,
        560,
    ),
    "llava-1.5-7b": Shape(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "ignore_index": -100,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "torch_dtype": "bfloat16",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "resample": 3,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
        {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001},
        "<image>",
        336,
        end="</s>",
    ),
    "qwen3-vl-30b-a3b": Shape(QWEN3_VL_30B_A3B, QWEN3_IMAGES, _QWEN_SPECIALS, _QWEN_PLACEHOLDER, 576),
    "qwen3.5-4b": Shape(QWEN3_5_4B, QWEN3_IMAGES, _QWEN_SPECIALS, _QWEN_PLACEHOLDER, 576),
    "tiny-qwen3.5": Shape(
        TINY_QWEN3_5,
        {**QWEN3_IMAGES, "size": {"shortest_edge": 4096, "longest_edge": 16777216}},
        _QWEN_SPECIALS,
        _QWEN_PLACEHOLDER,
        128,
    ),
    # Small enough for a CPU: the same code in seconds.
    "tiny": Shape(
        {
            **_QWEN2_VL,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {
                "hidden_size": 64,
                "embed_dim": 32,
                "num_heads": 2,
                "depth": 2,
                "in_chans": 3,
                "spatial_patch_size": 14,
            },
        },
        _QWEN_PICTURE,
        _QWEN_SPECIALS,
        _QWEN_PLACEHOLDER,
        112,
    ),
}


#: One public size of each further family, a JSON file each with the values of config.json and the others.
_PUBLIC = Path(__file__).parent / "public_shapes"
SHAPES |= {file.stem: Shape(**json.loads(file.read_text())) for file in sorted(_PUBLIC.glob("*.json"))}


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write the files of shape ``name`` into ``folder``; load it with ``load_format="dummy"``."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    write_configuration(shape, folder)
    _tokenizer(shape).save(str(folder / "tokenizer.json"))
    return folder


def write_configuration(shape: Shape, folder: Path) -> None:
    """Write all files but the tokenizer's vocabulary."""
    files = {
        "config.json": shape.config,
        "preprocessor_config.json": shape.preprocessor,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": shape.end,
            **shape.tokenizer,
        },
        "chat_template.json": {"chat_template": _TEMPLATE.replace("PICTURE", shape.picture)},
    }
    if shape.processor:
        files["processor_config.json"] = shape.processor
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))


def _tokenizer(shape: Shape) -> Tokenizer:
    """One token per byte, made-up tokens up to the full vocabulary, special tokens where they belong."""
    by_id = {token: text for text, token in shape.specials.items()}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {}
    for token in range(shape.vocab_size):
        fallback = alphabet[token] if token < len(alphabet) else f"t{token}"
        vocabulary[by_id.get(token, fallback)] = token
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(shape.specials))
    return tokenizer
