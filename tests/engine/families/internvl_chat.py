"""Tiny checkpoints of InternVL under its publishers' names, made from those that Transformers saves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import all_tensors
from tests.engine.families.internvl import SIDE, InternVLReference, make_internvl
from tests.engine.tiny import split_shards

#: Transformers' copy of a checkpoint, which the reference loads.
COPY = "transformers"
#: Fields of the tower that the publishers call otherwise.
_FIELDS = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
_NAMES = (
    (r"vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (
        r"vision_tower\.embeddings\.patch_embeddings\.projection\.(.*)",
        r"vision_model.embeddings.patch_embedding.\1",
    ),
    (r"vision_tower\.encoder\.layer\.(\d+)\.(.*)", r"vision_model.encoder.layers.\1.\2"),
    (r"multi_modal_projector\.layer_norm\.(.*)", r"mlp1.0.\1"),
    (r"multi_modal_projector\.linear_1\.(.*)", r"mlp1.1.\1"),
    (r"multi_modal_projector\.linear_2\.(.*)", r"mlp1.3.\1"),
)
_INNER = (
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "ls"),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
)


def make_internvl_chat(path: Path, hub: bool = False, **fields: Any) -> Path:
    """A checkpoint with fused projections; in several shards with ``hub``.

    Args:
        fields: of config.json.
    """
    make_internvl(path / COPY)
    images = json.loads((path / COPY / "preprocessor_config.json").read_text())
    colours = {name: images[name] for name in ("image_mean", "image_std")}
    publish(path, {"size": SIDE, "crop_size": SIDE, **colours}, max_dynamic_patch=6, **fields)
    if hub:
        split_shards(path)
    return path


def publish(path: Path, preprocessor: Mapping[str, Any], **fields: Any) -> None:
    """Write the checkpoint in the folder ``COPY`` of ``path`` into ``path``, in the publishers' layout.

    Args:
        preprocessor: preprocessor_config.json.
        fields: of config.json; None leaves a field out.
    """
    for file in (path / COPY).iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, path)
    tensors = _public(all_tensors(path / COPY))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((path / "config.json").read_text())
    tower = dict(saved["vision_config"])
    for field, renamed in _FIELDS.items():
        if field in tower:
            tower[renamed] = tower.pop(field)
    for field in ("image_size", "patch_size"):
        tower[field] = tower[field][0] if isinstance(tower[field], list) else tower[field]
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": saved["text_config"],
        "vision_config": tower,
        "downsample_ratio": saved.get("downsample_ratio", 0.5),
        "force_image_size": tower["image_size"],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": saved.get("vision_feature_layer", -1),
        "use_thumbnail": True,
        **fields,
    }
    config = {field: value for field, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def with_slow_tokenizer(path: Path) -> None:
    """Write a checkpoint's tokenizer as Transformers 4 saves a slow one: a vocabulary, its merges, and the
    added tokens behind it."""
    fast = json.loads((path / "tokenizer.json").read_text())
    added = {token["content"]: token for token in fast["added_tokens"]}
    ordinary = sorted(fast["model"]["vocab"].keys() - added.keys(), key=fast["model"]["vocab"].get)
    (path / "vocab.json").write_text(json.dumps({text: index for index, text in enumerate(ordinary)}))
    merges = [" ".join(pair) for pair in fast["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ids = {text: len(ordinary) + index for index, text in enumerate(added)}
    (path / "added_tokens.json").write_text(json.dumps(ids))
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    described = {ids[text]: {flag: token[flag] for flag in flags} for text, token in added.items()}
    config = {
        "added_tokens_decoder": described,
        "additional_special_tokens": list(added),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").unlink()


def _public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {_renamed(name): value for name, value in tensors.items()}
    for name in [name for name in found if re.search(r"\.attn\.q_proj\.", name)]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        if match := re.fullmatch(pattern, name.removeprefix("model.")):
            new = match.expand(replacement)
            if ".layers." in new:
                for old, inner in _INNER:
                    new = new.replace(old, inner)
            return new
    return name


class InternVLChatReference(InternVLReference):
    """Transformers' model of the same weights; its prompts have another placeholder."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path / COPY, **options)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        return super().inputs(replace(prompt, text=prompt.text.replace("<image>", "<IMG_CONTEXT>")))
