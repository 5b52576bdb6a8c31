"""Builds the parts of a model and fills them from a checkpoint."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import ModelPart
from engine.distributed.group import SingleProcessGroup, TensorParallelGroup
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig
from engine.families.registry import family_named
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from engine.weights.loader import fill_from_checkpoint, fill_with_noise, match_tensors

LoadFormat = Literal["auto", "dummy"]


def load_language_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tp: TensorParallelGroup | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    max_model_len: int | None = None,
) -> Decoder:
    """This rank's share of the decoder with its weights. Only the rank's own rows are read.

    Args:
        load_format: ``dummy`` fills with seeded noise instead, without touching a weight file.
        max_model_len: see :class:`Decoder`.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of the wrong shape. The headers are
            checked before any tensor is read.
    """
    build = BuildContext(device, dtype, tp or SingleProcessGroup())
    decoder = Decoder(config.decoder, build, max_model_len=max_model_len)
    _fill(decoder, "language", checkpoint, config, load_format, seed)
    return decoder


def load_vision_encoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: LoadFormat = "auto",
    seed: int = 0,
) -> MediaEncoder:
    """The vision part with its weights; arguments and errors as :func:`load_language_model`."""
    if config.vision is None:
        raise CheckpointError(f"{config.architecture} has no vision part")
    encoder = family_named(config.family).build_encoder(
        config, BuildContext(device, dtype, SingleProcessGroup())
    )
    assert isinstance(encoder, nn.Module)
    _fill(encoder, "vision", checkpoint, config, load_format, seed)
    return encoder


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check the headers of all parts' tensors; errors as :func:`load_language_model`.

    Loading a part checks that part alone. A process that loads several calls this first, so that a fault in
    the last part is reported before the first one is read.
    """
    family = family_named(config.family)
    build = BuildContext(torch.device("meta"), torch.float32, SingleProcessGroup())
    rules = family.weight_rules(config)
    match_tensors(Decoder(config.decoder, build), "language", checkpoint, rules)
    if config.vision is not None:
        encoder = family.build_encoder(config, build)
        assert isinstance(encoder, nn.Module)
        match_tensors(encoder, "vision", checkpoint, rules)


def _fill(
    module: nn.Module,
    part: ModelPart,
    checkpoint: Checkpoint,
    config: ModelConfig,
    load_format: LoadFormat,
    seed: int,
) -> None:
    if load_format == "dummy":
        fill_with_noise(module, seed)
    else:
        fill_from_checkpoint(module, part, checkpoint, family_named(config.family).weight_rules(config))
    module.eval()
