"""Describes the weights of causal convolutions, whose channels the ranks split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.build import WeightSlot
from engine.layers.linear import FusedPart


def conv_slot(name: str, weight: torch.Tensor, parts: Sequence[FusedPart]) -> WeightSlot:
    """Describe the checkpoint's tensor of a convolution: ``(channels of all parts, 1, width)``.

    Args:
        name: the tensor's name.
        weight: this rank's channels, part after part: ``(channels of the rank, width)``.
        parts: the parts, in the checkpoint's order.
    """
    width = weight.shape[1]
    slot = WeightSlot(name, (sum(part.total for part in parts), 1, width))
    own = offset = 0
    for part in parts:
        first = offset + part.start
        region = (slice(first, first + part.size), slice(0, 1), slice(0, width))
        slot.copies.append((region, weight.data[own : own + part.size, None]))
        own, offset = own + part.size, offset + part.total
    return slot
