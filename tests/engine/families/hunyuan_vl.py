"""A tiny HunyuanOCR checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

PATCH = 4
_IMAGE, _START, _END = "<|image|>", "<|image_start|>", "<|image_end|>"
IMAGE = _START + _IMAGE + _END
FRAME = "<s>{}<|user|>"
SPECIALS = ("<pad>", "<s>", "</s>", "<|user|>", _START, _IMAGE, _END)
TOKENS = {"image_token": _IMAGE, "image_start_token": _START, "image_end_token": _END}
#: Angles of the four axes; of three, by which files may do without the first.
SECTION = [1, 3, 2, 2]
#: As public files state it: a base that is raised once for all, under the name of another scaling.
ROPE = {"rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}


def hunyuan_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(
        SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=TOKENS
    )


def make_hunyuan_vl(path: Path, hub: bool) -> Path:
    """A checkpoint with a table of 7x7 positions, and queries and keys that rotate before their norms.

    Args:
        hub: write it as the public one is: flat config.json in the old spelling, the tower's tensors under
            ``vit.``, and several shards.
    """
    tok = hunyuan_tokenizer()
    config = transformers.HunYuanVLConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "attention_bias": not hub,
            "rope_parameters": {"rope_type": "dynamic", **ROPE, "mrope_section": SECTION},
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": hub,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "max_image_size": 7 * PATCH,
        },
        image_token_id=tok.convert_tokens_to_ids(_IMAGE),
        im_start_id=tok.convert_tokens_to_ids(_START),
        im_end_id=tok.convert_tokens_to_ids(_END),
        tie_word_embeddings=hub,
    )
    model = transformers.HunYuanVLForConditionalGeneration(config)
    spread(model, seed=8, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = image_processor()(patch_size=PATCH, size={"shortest_edge": 256, "longest_edge": 4096})
    processor.save_pretrained(path)
    if hub:
        _as_on_the_hub(path)
    return path


def image_processor() -> Any:
    """The class, which needs no torchvision."""
    return transformers.HunYuanVLImageProcessorPil


def _as_on_the_hub(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    text["attention_head_dim"], text["org_vocab_size"] = text.pop("head_dim"), text["vocab_size"]
    for name in ("dtype", "model_type", "tie_word_embeddings", "rope_parameters"):
        text.pop(name, None)
    rope = {"type": "xdrope", "factor": 1.0, "alpha": ROPE["alpha"], "mscale": 1.0, "xdrope_section": SECTION}
    config = {**text, **config, "rope_theta": ROPE["rope_theta"], "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(config))
    stated = {"min_pixels": 256, "max_pixels": 4096, "patch_size": PATCH, "merge_size": 2, "resample": 1}
    stated["image_processor_type"] = "HunYuanVLImageProcessor"
    (path / "preprocessor_config.json").write_text(json.dumps(stated))
    rewrite_tensors(path, _public_names)
    split_shards(path)


def _public_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_public_name(name): tensor for name, tensor in tensors.items()}


def _public_name(name: str) -> str:
    if not name.startswith("model.vision_tower."):
        return name.replace("model.language_model.", "model.")
    name = name.replace("model.vision_tower.", "vit.").replace(".patch_merger.", ".perceive.")
    for saved, public in (
        (".mlp.fc1.", ".mlp.dense_h_to_4h."),
        (".mlp.fc2.", ".mlp.dense_4h_to_h."),
        (".layer_norm1.", ".input_layernorm."),
        (".layer_norm2.", ".post_attention_layernorm."),
        (".proj_conv.", ".proj.0."),
        (".proj_out.", ".proj.2."),
    ):
        name = name.replace(saved, public)
    return name


def _by_pairs(section: list[int], angles: torch.Tensor) -> torch.Tensor:
    """Both halves of a head with each angle's axis: ``(axes, B, T, angles)`` to ``(B, T, 2 * angles)``.

    So the model's first code has it, and the publisher's for other engines. The class in Transformers cuts a
    whole head in as many pieces as there are axes, so that the two numbers of a pair turn by different ones.
    """
    half = torch.cat([part[axis] for axis, part in enumerate(angles.split(section, dim=-1))], dim=-1)
    return torch.cat([half, half], dim=-1)


class HunyuanReference:
    """Transformers' model and processor."""

    def __init__(self, path: Path) -> None:
        kind = transformers.HunYuanVLForConditionalGeneration
        self.model = kind.from_pretrained(path, dtype=torch.float32).eval()
        rotary = self.model.model.language_model.rotary_emb
        rotary.recomposition_frequencies = partial(_by_pairs, list(rotary.mrope_section))
        images = image_processor().from_pretrained(path)
        tok = PreTrainedTokenizerFast.from_pretrained(path, extra_special_tokens=TOKENS)
        self.processor = transformers.HunYuanVLProcessor(images, tok)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        made = self.processor(text=[prompt.text], images=list(prompt.pictures) or None, return_tensors="pt")
        arguments = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
