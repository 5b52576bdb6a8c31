"""The parts of a checkpoint on disk that families make of it: configuration, media processor and encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.folder import Checkpoint
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


def encoder(path: Path) -> Any:
    """On the CPU, in float32."""
    return load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)
