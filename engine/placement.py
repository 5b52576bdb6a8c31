"""Chooses the device and the dtype of a model."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.families.base import ModelConfig


def resolve_device(config: EngineConfig) -> torch.device:
    """The device of ``config``.

    Raises:
        ConfigError: a GPU is asked for where there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device is cuda, but PyTorch sees no GPU here", param="device")
    return torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")


def resolve_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of weights and cache: ``auto`` is the checkpoint's on a GPU, float32 on a CPU."""
    name: str = config.dtype
    if name == "auto":
        name = model.dtype if resolve_device(config).type == "cuda" else "float32"
    return getattr(torch, name)


def open_device(device: torch.device) -> None:
    """Make the context of a GPU, which its first use would do otherwise: it takes up to a second or two."""
    torch.zeros(1, device=device)


def begin_to_open_device(config: EngineConfig) -> None:
    """Open the device of ``config`` on another thread, while the caller imports modules, say. What fails is
    left to :func:`open_device`."""

    def work() -> None:
        with suppress(Exception):
            open_device(resolve_device(config))

    Thread(target=work, name="device", daemon=True).start()


def describe_device(config: EngineConfig) -> str:
    """The devices of ``config`` in words, such as ``2 x NVIDIA H100 80GB HBM3`` or ``CPU``."""
    device = resolve_device(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    count = config.tensor_parallel_size
    return name if count == 1 else f"{count} x {name}"
