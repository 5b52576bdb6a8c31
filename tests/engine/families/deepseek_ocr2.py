"""Tiny checkpoints of DeepSeek-OCR 2, and Transformers' model and processor of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, spread, tokenizer

SPECIALS = ("<pad>", "<bos>", "<eos>", "<image>")
#: The class has 144 queries for a tile and 256 for a whole image, each of 4x4 patches.
PATCH, TILE, WHOLE = 2, 96, 128
FRAME = "<bos>{}"
PUBLISHED = "DeepseekOCR2ForCausalLM"
#: Where config.json is the publisher's.
TRANSFORMERS_CONFIG = "transformers_config.json"


def deepseek_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def sam_sizes() -> dict[str, Any]:
    """Fields of the tower: a block with windows, which don't divide either side, and one without."""
    return {
        "hidden_size": 16,
        "mlp_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "output_channels": 8,
        "image_size": WHOLE,
        "patch_size": PATCH,
        "window_size": 7,
        "global_attn_indexes": [1],
        "downsample_channels": [12, 32],
    }


def make_deepseek_ocr2(
    path: Path,
    hub: bool = False,
    *,
    published: bool = False,
    processor: dict[str, Any] | None = None,
    sam: dict[str, Any] | None = None,
    **text: Any,
) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        published: config.json and the processor's file are like the publisher's.
        processor, sam: further fields of the image processor and of the tower.
        text: further fields of the decoder.
    """
    tok = deepseek_tokenizer()
    config = transformers.DeepseekOcr2Config(
        vision_config={
            "sam_config": {**sam_sizes(), **(sam or {})},
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        text_config={
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "num_hidden_layers": 3,
            "max_position_embeddings": 4096,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **text,
        },
        image_token_id=SPECIALS.index("<image>"),
        tie_word_embeddings=hub,
    )
    model = spread(
        transformers.DeepseekOcr2ForConditionalGeneration(config),
        seed=43,
        embedding_std=0.05 if hub else 1.0,
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = image_processor()(size={"height": WHOLE, "width": WHOLE}, tile_size=TILE, **(processor or {}))
    images.save_pretrained(path)
    if hub:
        as_on_the_hub(path, **images.to_dict())
    if published:
        as_published(path)
    return path


def as_published(path: Path) -> None:
    """Rewrite config.json; Transformers' own goes to another file. The tensors have the publisher's names."""
    file = path / "config.json"
    file.rename(path / TRANSFORMERS_CONFIG)
    config = json.loads((path / TRANSFORMERS_CONFIG).read_text())
    text, encoder, sam = (
        config["text_config"],
        *map(config["vision_config"].pop, ("encoder_config", "sam_config")),
    )
    kinds = text.pop("mlp_layer_types")
    config["architectures"], config["model_type"] = [PUBLISHED], "deepseek_vl_v2"
    config["language_config"] = {
        **config.pop("text_config"),
        "first_k_dense_replace": (*kinds, "sparse").index("sparse"),
        "use_mla": False,
    }
    for name, field in (
        ("heads", "num_attention_heads"),
        ("layers", "num_hidden_layers"),
        ("width", "hidden_size"),
    ):
        sam[name] = sam.pop(field)
    # Its second width is not what the encoder takes.
    sam["downsample_channels"] = [sam["downsample_channels"][0], 99]
    encoder["dim"] = encoder.pop("hidden_size")
    config["vision_config"] = {"model_type": "vision", "width": {"qwen2-0-5b": encoder, "sam_vit_b": sam}}
    file.write_text(json.dumps(config))


def image_processor() -> Any:
    """Transformers' class that works with Pillow."""
    module = importlib.import_module("transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2")
    return module.DeepseekOcr2ImageProcessorPil


class DeepseekReference:
    """Transformers' model and processor.

    Args:
        options: of the processor.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = options
        cls = transformers.DeepseekOcr2ForConditionalGeneration
        file = path / TRANSFORMERS_CONFIG
        config = transformers.DeepseekOcr2Config.from_json_file(file) if file.exists() else None
        self.model = cls.from_pretrained(path, config=config, dtype=torch.float32).eval()
        tower = self.model.config.vision_config.sam_config
        self.processor = transformers.DeepseekOcr2Processor(
            image_processor().from_pretrained(path),
            PreTrainedTokenizerFast.from_pretrained(path),
            patch_size=tower.patch_size,
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        if prompt.pictures:
            made = self.processor(
                text=[prompt.text], images=list(prompt.pictures), return_tensors="pt", **self.options
            )
        else:
            # Some releases of the processor take no text without an image.
            made = self.processor.tokenizer([prompt.text], return_tensors="pt")
        ids, embeds = made["input_ids"], self.model.get_input_embeddings()(made["input_ids"])
        if prompt.pictures:
            # The tower runs once for a prompt, not once for each token of its answer.
            rows = self.model.get_image_features(
                made["pixel_values"], made.get("pixel_values_local"), made["num_local_patches"]
            ).pooler_output
            embeds[ids == self.model.config.image_token_id] = torch.cat(rows)
        arguments = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
        return Inputs(ids[0].tolist(), self.model, arguments)
