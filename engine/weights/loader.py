"""Fills a model from a checkpoint: every weight exactly once, and nothing left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import nn

from engine.checkpoint.folder import Checkpoint, TensorInfo
from engine.checkpoint.rules import ModelPart, WeightRules, listing
from engine.errors import CheckpointError
from engine.layers.build import WeightSlot
from engine.weights.reader import Rows, read_rows

_DUMMY_STD = 0.02


def fill_from_checkpoint(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> None:
    """Stream the tensors of ``part`` into ``module``; errors as :func:`match_tensors`."""
    wanted = match_tensors(module, part, checkpoint, rules)
    found = [(name, checkpoint.tensors[name], slot) for name, slot in wanted.items()]
    found.sort(key=lambda entry: (entry[1].file, entry[1].begin))
    rows = (Rows.of(name, info, *_needed(slot)) for name, info, slot in found)
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    for piece, values in read_rows(rows, pinned=on_gpu):
        _take_in(piece, values, wanted[piece.name])
    if on_gpu:
        torch.cuda.synchronize()


def match_tensors(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> dict[str, WeightSlot]:
    """Map each tensor name of ``part`` in the checkpoint to the slot that it fills. Only headers are read.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of the wrong shape.
    """
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
