"""Fills a model from a checkpoint: every weight exactly once, and nothing left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

import torch
from torch import nn

from engine.distributed.group import SingleProcessGroup, TensorParallelGroup
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig
from engine.families.registry import family_named
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.decoder import Decoder
from engine.weights.checkpoint import Checkpoint, TensorInfo
from engine.weights.reader import Rows, read_rows
from engine.weights.rules import ModelPart, WeightRules, listing

LoadFormat = Literal["auto", "dummy"]
_DUMMY_STD = 0.02


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
    """This rank's share of the decoder, filled. Only its own tensors are read.

    Args:
        load_format: ``dummy`` fills with seeded noise instead, without touching a weight file.
        max_model_len: see :class:`Decoder`.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of the wrong shape, before any is read.
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
    """The vision part, filled; as :func:`load_language_model`."""
    if config.vision is None:
        raise CheckpointError(f"{config.architecture} has no vision part")
    encoder = family_named(config.family).build_encoder(
        config, BuildContext(device, dtype, SingleProcessGroup())
    )
    assert isinstance(encoder, nn.Module)
    _fill(encoder, "vision", checkpoint, config, load_format, seed)
    return encoder


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Whether all tensors of all parts are there, by their headers; errors as :func:`load_language_model`.

    Each part's loading checks its own. Where one process loads several, what is wrong with the last is told
    before the first takes its time.
    """
    family = family_named(config.family)
    build = BuildContext(torch.device("meta"), torch.float32, SingleProcessGroup())
    rules = family.weight_rules(config)
    _match(Decoder(config.decoder, build), "language", checkpoint, rules)
    if config.vision is not None:
        encoder = family.build_encoder(config, build)
        assert isinstance(encoder, nn.Module)
        _match(encoder, "vision", checkpoint, rules)


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


def fill_from_checkpoint(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> None:
    """Stream the tensors of ``part`` into ``module``; see :func:`load_language_model` for errors."""
    wanted = _match(module, part, checkpoint, rules)
    found = [(name, checkpoint.tensors[name], slot) for name, slot in wanted.items()]
    found.sort(key=lambda entry: (entry[1].file, entry[1].begin))
    rows = (Rows.of(name, info, *_needed(slot)) for name, info, slot in found)
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    for piece, values in read_rows(rows, pinned=on_gpu):
        _take_in(piece, values, wanted[piece.name])
    if on_gpu:
        torch.cuda.synchronize()


def _match(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> dict[str, WeightSlot]:
    """Where each tensor of ``part`` belongs, by its name in the checkpoint; none is read."""
    names = rules.assign(checkpoint.tensors)[part]
    slots = _collect_slots(module, names)
    missing = slots.keys() - names.keys()
    if missing:
        spelled = [_spelled(internal, names) for internal in missing]
        raise CheckpointError(f"the checkpoint lacks tensors of the {part} model: {listing(spelled)}")
    left_over = names.keys() - slots.keys()
    if left_over:
        surplus = [names[name] for name in left_over]
        raise CheckpointError(f"tensors that the {part} model doesn't have: {listing(surplus)}")
    wanted = {names[internal]: slot for internal, slot in slots.items()}
    for name, slot in wanted.items():
        _check_shape(name, checkpoint.tensors[name], slot)
    return wanted


def _spelled(internal: str, names: dict[str, str]) -> str:
    """What a checkpoint of ``names`` would call the tensor ``internal`` that it lacks: it begins as most of
    the tensors nearest to it do."""
    parts = internal.split(".")
    near = {name: _shared(name.split("."), parts) for name in names}
    nearest = max(near.values(), default=0)
    beginnings: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    for name in (name for name, shared in near.items() if shared == nearest):
        own, theirs = name.split("."), names[name].split(".")
        tail = _shared(own[::-1], theirs[::-1])
        beginnings[tuple(own[: len(own) - tail]), tuple(theirs[: len(theirs) - tail])] += 1
    for (head, wanted), _ in beginnings.most_common():
        if tuple(parts[: len(head)]) == head:
            return ".".join([*wanted, *parts[len(head) :]])
    return internal


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the first parts are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _needed(slot: WeightSlot) -> tuple[int, int]:
    """The first row that a slot's copies look at, and the one after the last."""
    spans = [region[0] for region, _ in slot.copies]
    return min(span.start for span in spans), max(span.stop for span in spans)


def _take_in(piece: Rows, values: torch.Tensor, slot: WeightSlot) -> None:
    """Copy some rows of a slot's tensor to where they belong."""
    values = values.reshape(piece.count, *slot.shape[1:])
    for (span, *columns), target in slot.copies:
        begin, end = max(piece.first, span.start), min(piece.first + piece.count, span.stop)
        if begin < end:
            own = values[(slice(begin - piece.first, end - piece.first), *columns)]
            target[begin - span.start : end - span.start].copy_(own, non_blocking=True)


def fill_with_noise(module: nn.Module, seed: int) -> None:
    """Small normal weights, unit norm scales, zero biases: finite activations at any depth."""
    parameters = list(module.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0.0, _DUMMY_STD, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)


def _collect_slots(module: nn.Module, names: dict[str, str]) -> dict[str, WeightSlot]:
    slots: dict[str, WeightSlot] = {}
    for path, layer in module.named_modules():
        if hasattr(layer, "weight_slots"):
            for slot in layer.weight_slots(f"{path}." if path else "", names):
                assert slot.source not in slots, f"two layers want {slot.source}"
                slots[slot.source] = slot
    filled = {target.untyped_storage().data_ptr() for slot in slots.values() for _, target in slot.copies}
    for name, parameter in module.named_parameters():
        assert parameter.untyped_storage().data_ptr() in filled, f"no checkpoint tensor fills {name}"
    return slots


def _check_shape(name: str, info: TensorInfo, slot: WeightSlot) -> None:
    if info.shape == slot.shape:
        return
    same_numbers = info.shape[:1] == slot.shape[:1] and _count(info.shape) == _count(slot.shape)
    if not (slot.reshape and same_numbers):
        raise CheckpointError(
            f"tensor {name} in {info.file.name} has shape {list(info.shape)}, "
            f"the configuration wants {list(slot.shape)}"
        )


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
