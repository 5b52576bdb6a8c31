"""The parts of a checkpoint on disk that families make of it: configuration, media processor and encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import MediaProcessor, ModelConfig
from engine.families.load import load_vision_encoder
from engine.families.registry import resolve


def parse(path: Path) -> tuple[Checkpoint, ModelConfig]:
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, resolve(checkpoint).parse(checkpoint)


def media_processor(path: Path, **options: Any) -> MediaProcessor | None:
    """Return the checkpoint's media processor with the user's ``options``."""
    checkpoint, config = parse(path)
    return resolve(checkpoint).media_processor(checkpoint, config, options)


def copy_json(path: Path, folder: Path) -> None:
    """Copy the files of a checkpoint but its tensors."""
    for file in path.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())


def check_refused(path: Path, file: str, fields: dict[str, Any], param: str) -> None:
    """Check that a checkpoint is refused, naming ``param``, with other ``fields`` in one of its files."""
    stated = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**stated, **fields}))
    with pytest.raises(CheckpointError) as refused:
        media_processor(path)
    assert refused.value.param == param


def encoder(path: Path) -> Any:
    """On the CPU, in float32."""
    return load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)
