"""Rewrites a checkpoint that Transformers saved into the layout of the public ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.engine.tiny import split_shards


def as_on_the_hub(path: Path, **preprocessor: Any) -> None:
    """config.json in the old spelling, preprocessor_config.json, and several shards with an index.

    Args:
        preprocessor: the fields of preprocessor_config.json; none for a text-only model.
    """
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(_respelled(config)))
    for file in ("processor_config.json", "preprocessor_config.json"):
        (path / file).unlink(missing_ok=True)
    if preprocessor:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    split_shards(path)


def under_vision_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a tower by the names of public checkpoints, with ``vision_model`` in front."""
    prefix = "vision_tower."
    return {
        f"{prefix}vision_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in tensors.items()
    }


def _respelled(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary fields and dtype as before Transformers 5, in nested configurations too."""
    found = {key: _respelled(value) if isinstance(value, dict) else value for key, value in config.items()}
    found.pop("layer_types", None)
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    rope = found.pop("rope_parameters", None)
    if rope is not None:
        rope = dict(rope)
        found["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        if kind == "longrope":
            # Beside the dictionary, not in it.
            rope.pop("original_max_position_embeddings", None)
        if kind != "default":
            found["rope_scaling"] = {"type" if kind == "longrope" else "rope_type": kind, **rope}
    return found


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all shards by name."""
    return {
        name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()
    }
