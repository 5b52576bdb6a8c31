"""Loads a checkpoint's tensors into a model: every weight exactly once, and no tensor is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import nn

from engine.checkpoint.folder import Checkpoint, TensorInfo
from engine.checkpoint.rules import ModelPart, WeightRules, listing
from engine.errors import CheckpointError
from engine.layers.build import WeightSlot
from engine.weights.reader import Rows, read_rows

_DUMMY_STD = 0.02
#: Ends of the names of the scales of quantised matrices.
_SCALES = (".scales", "_scale", "_scale_inv")


def fill_from_checkpoint(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> None:
    """Stream the tensors of ``part`` into ``module``; errors as :func:`match_tensors`."""
    wanted = match_tensors(module, part, checkpoint, rules)
    in_files = [(name, _plain(checkpoint.tensors[name], slot), slot) for name, slot in wanted.items()]
    in_files.sort(key=lambda entry: (entry[1].file, entry[1].begin))
    rows = (Rows.of(name, info, *_needed_rows(slot)) for name, info, slot in in_files)
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    for piece, values in read_rows(rows, pinned=on_gpu):
        _copy(piece, values, wanted[piece.name])
    _finish(module)
    if on_gpu:
        torch.cuda.synchronize()


def match_tensors(
    module: nn.Module, part: ModelPart, checkpoint: Checkpoint, rules: WeightRules
) -> dict[str, WeightSlot]:
    """Map each tensor name of ``part`` in the checkpoint to the slot that it fills.

    Only headers are read, and biases that the model doesn't have: those of zeros are left out. AutoGPTQ
    stores them for layers without a bias.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of the wrong shape.
    """
    names = rules.assign(checkpoint.tensors)[part]
    slots = _collect_slots(module, names)
    missing = slots.keys() - names.keys()
    if missing:
        guessed = [_checkpoint_name(internal, names) for internal in missing]
        raise CheckpointError(f"the checkpoint lacks tensors of the {part} model: {listing(guessed)}")
    surplus = {names[name] for name in names.keys() - slots.keys()}
    surplus -= _zero_biases(surplus, checkpoint)
    if surplus:
        raise CheckpointError(f"tensors that the {part} model doesn't have: {listing(surplus)}")
    wanted = {names[internal]: slot for internal, slot in slots.items()}
    for name, slot in wanted.items():
        _check_shape(name, _plain(checkpoint.tensors[name], slot), slot)
    return wanted


def _zero_biases(names: Collection[str], checkpoint: Checkpoint) -> set[str]:
    """Those of the checkpoint's tensors ``names`` that are biases and add nothing."""
    infos = {name: checkpoint.tensors[name] for name in names if name.endswith(".bias")}
    biases = [Rows.of(name, info, 0, info.shape[0]) for name, info in infos.items() if len(info.shape) == 1]
    if not biases:
        return set()
    other = {rows.name for rows, values in read_rows(biases, pinned=False) if values.any()}
    return {rows.name for rows in biases} - other


def _plain(info: TensorInfo, slot: WeightSlot) -> TensorInfo:
    """``info`` without leading axes of length 1 that the slot's tensor lacks; a lone number as a vector."""
    if not info.shape and slot.shape == (1,):
        return replace(info, shape=(1,))
    surplus = len(info.shape) - len(slot.shape)
    if surplus > 0 and info.shape[surplus:] == slot.shape and _count(info.shape[:surplus]) == 1:
        return replace(info, shape=slot.shape)
    return info


def _checkpoint_name(internal: str, names: Mapping[str, str]) -> str:
    """The probable name in the checkpoint of the module's tensor ``internal``, which the checkpoint lacks.

    The tensors with the longest common beginning show how the checkpoint renames beginnings; the most
    frequent renaming that applies is used.

    Args:
        names: names in the module to names in the checkpoint.
    """
    parts = internal.split(".")
    common = {name: _common_parts(name.split("."), parts) for name in names}
    longest = max(common.values(), default=0)
    renamings: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    for name in (name for name, count in common.items() if count == longest):
        own, theirs = name.split("."), names[name].split(".")
        tail = _common_parts(own[::-1], theirs[::-1])
        renamings[tuple(own[: len(own) - tail]), tuple(theirs[: len(theirs) - tail])] += 1
    for (head, renamed), _ in renamings.most_common():
        if tuple(parts[: len(head)]) == head:
            return ".".join([*renamed, *parts[len(head) :]])
    return internal


def _common_parts(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of equal parts at the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _needed_rows(slot: WeightSlot) -> tuple[int, int]:
    """The first row that a slot's copies need, and the one after the last."""
    spans = [region[0] for region, _ in slot.copies]
    return min(span.start for span in spans), max(span.stop for span in spans)


def _copy(piece: Rows, values: torch.Tensor, slot: WeightSlot) -> None:
    """Copy rows of a slot's tensor into the parameters that need them."""
    if _is_transposed((slot.shape[0], *piece.tail), slot):
        values = values.transpose(1, 2)
    else:
        values = values.reshape(piece.count, *slot.shape[1:])
    for (span, *columns), target in slot.copies:
        begin, end = max(piece.first, span.start), min(piece.first + piece.count, span.stop)
        if begin < end:
            own = values[(slice(begin - piece.first, end - piece.first), *columns)]
            target[begin - span.start : end - span.start].copy_(own, non_blocking=True)


def _finish(module: nn.Module) -> None:
    """Put weights into the order of the kernels: those of a layer after those of layers inside it."""
    for layer in reversed(list(module.modules())):
        finish = getattr(layer, "finish_loading", None)
        if finish is not None:
            finish()


def fill_with_noise(module: nn.Module, seed: int) -> None:
    """Fill with small normal weights, unit norm scales and zero biases: activations stay finite.

    Numbers of quantised weights are any, and all their scales the same.

    Each tensor is drawn whole, and a rank keeps its share: the model is the same on any number of ranks.
    """
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for slot in _collect_slots(module, {}).values():
        if slot.copies[0][1].dim() >= 2:
            noise = _noise(slot, generator)
            for region, target in slot.copies:
                target.copy_(noise[region])
        else:
            for _, target in slot.copies:
                target.fill_(0.0 if slot.source.endswith("bias") else 1.0)
    _finish(module)


def _noise(slot: WeightSlot, generator: torch.Generator) -> torch.Tensor:
    """Draw the tensor of a matrix, or make that of a quantised matrix's scales."""
    dtype, device = slot.copies[0][1].dtype, generator.device
    if slot.source.endswith(_SCALES):
        return torch.full(slot.shape, _DUMMY_STD, device=device).to(dtype)
    if dtype.is_floating_point:
        small = dtype.itemsize == 1
        noise = torch.empty(slot.shape, dtype=torch.float32 if small else dtype, device=device)
        # Scales make numbers in fp8 as small.
        return noise.normal_(0.0, 1.0 if small else _DUMMY_STD, generator=generator).to(dtype)
    bounds = torch.iinfo(dtype)
    noise = torch.empty(slot.shape, dtype=dtype, device=device)
    return noise.random_(bounds.min, bounds.max, generator=generator)


def _collect_slots(module: nn.Module, names: Mapping[str, str]) -> dict[str, WeightSlot]:
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
    if _is_transposed(info.shape, slot):
        return
    same_numbers = info.shape[:1] == slot.shape[:1] and _count(info.shape) == _count(slot.shape)
    if not (slot.reshape and same_numbers):
        raise CheckpointError(
            f"tensor {name} in {info.file.name} has shape {list(info.shape)}, "
            f"the configuration wants {list(slot.shape)}"
        )


def _is_transposed(shape: tuple[int, ...], slot: WeightSlot) -> bool:
    """Return whether ``shape`` is that of ``slot`` with its last two axes swapped; False if both fit."""
    if not slot.may_be_transposed or shape == slot.shape:
        return False
    first, outputs, inputs = slot.shape
    return shape == (first, inputs, outputs)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
