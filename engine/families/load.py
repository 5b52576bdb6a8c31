"""Builds the parts of a model and fills them from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import TIED_HEAD, ModelPart, WeightRules
from engine.distributed.group import SingleProcessGroup, TensorParallelGroup
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig
from engine.families.registry import family_named
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from engine.layers.matrix_formats import Fp8Format
from engine.weights.formats import rules_with_scales, stated_formats, stored_formats
from engine.weights.loader import fill_from_checkpoint, fill_with_noise, match_tensors
from engine.weights.tied import EMBEDDINGS, StoredHead, stored_head

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
    vectors_only: bool = False,
    quantization: Literal["fp8"] | None = None,
) -> Decoder:
    """This rank's share of the decoder with its weights. Only the rank's own rows are read.

    Args:
        load_format: ``dummy`` fills with seeded noise instead, in the format that config.json states, without
            touching a weight file.
        quantization: rounds the matrices of the decoder's layers to fp8 if they aren't stored so.
        max_model_len: see :class:`Decoder`.
        vectors_only: the head is not needed: checkpoints of embedding models may lack it.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of the wrong shape. The headers are
            checked before any tensor is read.
    """
    rules = None
    if load_format == "dummy":
        formats = stated_formats(checkpoint)
    else:
        config, rules = _stored(checkpoint, config, vectors_only)
        formats = stored_formats(checkpoint, rules)
    if quantization == "fp8" and not formats.by_name and formats.every is None:
        formats = replace(formats, every=Fp8Format(None, "output"))
    build = BuildContext(device, dtype, tp or SingleProcessGroup(), formats)
    decoder = Decoder(config.decoder, build, max_model_len=max_model_len)
    _fill(decoder, "language", checkpoint, rules, seed)
    return decoder


def load_vision_encoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    quantization: Literal["fp8"] | None = None,
) -> MediaEncoder:
    """The vision part with its weights.

    Args:
        quantization: rounds the matrices in the blocks of the tower to fp8.

    Further arguments and errors as :func:`load_language_model`.
    """
    if config.vision is None:
        raise CheckpointError(f"{config.architecture} has no vision part")
    family = family_named(config.family)
    tower = None if quantization is None else Fp8Format(None, "output")
    build = BuildContext(device, dtype, SingleProcessGroup(), tower=tower)
    encoder = family.build_encoder(config, build)
    assert isinstance(encoder, nn.Module)
    rules = None if load_format == "dummy" else rules_with_scales(family.weight_rules(config), checkpoint)
    _fill(encoder, "vision", checkpoint, rules, seed)
    return encoder


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, *, vectors_only: bool = False) -> None:
    """Check the headers of all parts' tensors; errors as :func:`load_language_model`.

    Loading a part checks that part alone. A process that loads several calls this first, so that a fault in
    the last part is reported before the first one is read.
    """
    family = family_named(config.family)
    build = BuildContext(torch.device("meta"), torch.float32, SingleProcessGroup())
    stored, rules = _stored(checkpoint, config, vectors_only)
    formats = stored_formats(checkpoint, rules)
    decoder = Decoder(stored.decoder, replace(build, formats=formats))
    match_tensors(decoder, "language", checkpoint, rules)
    if config.vision is not None:
        encoder = family.build_encoder(config, build)
        assert isinstance(encoder, nn.Module)
        match_tensors(encoder, "vision", checkpoint, rules)


def _stored(
    checkpoint: Checkpoint, config: ModelConfig, vectors_only: bool
) -> tuple[ModelConfig, WeightRules]:
    """``config`` with embeddings tied only if the stored tensors agree with that; the names of the tensors.

    As in Transformers, a stored head with other values than the embeddings is a head of its own, and a head
    stored without embeddings is both.
    """
    family = family_named(config.family)
    untied = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
    rules = rules_with_scales(family.weight_rules(untied), checkpoint)
    if not config.decoder.tie_word_embeddings:
        if vectors_only and stored_head(checkpoint, rules) is StoredHead.NONE:
            # A head that nothing calls takes no memory of its own.
            return replace(config, decoder=replace(config.decoder, tie_word_embeddings=True)), rules
        return config, rules
    head = stored_head(checkpoint, rules)
    if head is StoredHead.OTHER:
        return untied, rules
    if head is StoredHead.ALONE:
        return config, replace(rules, language=((TIED_HEAD, EMBEDDINGS), *rules.language))
    return config, rules_with_scales(family.weight_rules(config), checkpoint)


def _fill(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules | None, seed: int
) -> None:
    """Fill ``module`` with the checkpoint's tensors; without ``rules``, with noise."""
    if rules is None:
        fill_with_noise(module, seed)
    else:
        fill_from_checkpoint(module, part, checkpoint, rules)
    module.eval()
