"""Reads which layers of a decoder are recurrent."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError


def recurrent_layers(kinds: Any, layers: int, recurrent: str) -> tuple[int, ...]:
    """Return the indices of the layers that config.json's ``layer_types`` calls ``recurrent``.

    Args:
        kinds: the list, of ``recurrent`` and ``full_attention``.
        layers: number of layers.

    Raises:
        CheckpointError: ``layer_types`` is no such list, or no layer has full attention.
    """
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not {recurrent, "full_attention"}.issuperset(kinds)
    ):
        raise CheckpointError(
            f"config.json: layer_types should be {recurrent} or full_attention for {layers} layers",
            param="layer_types",
        )
    found = tuple(layer for layer, kind in enumerate(kinds) if kind == recurrent)
    if len(found) == layers:
        raise CheckpointError("config.json: a layer with full_attention is needed", param="layer_types")
    return found
