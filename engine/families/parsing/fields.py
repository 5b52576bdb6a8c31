"""Readers of single config.json fields. Each names the field in its error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.vision.transformer_config import VISION_ACTIVATIONS

Json = Mapping[str, Any]


def integer(config: Json, field: str, *, least: int = 1) -> int:
    """The integer ``field`` of ``config``, at least ``least``.

    Raises:
        CheckpointError: the field is missing, null or something else.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise CheckpointError(f"config.json: {field} should be {wanted}, not {value!r}", param=field)
    return value


def number(config: Json, field: str, *, param: str | None = None) -> float:
    """The positive number ``field`` of ``config``; errors as :func:`integer`.

    Args:
        param: the field of config.json that holds ``config``, if ``config`` is a part of it.
    """
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(
            f"config.json: {field} should be a positive number, not {value!r}", param=param or field
        )
    return float(value)


def numbers(config: Json, field: str, count: int, *, param: str) -> tuple[float, ...]:
    """The list of ``count`` numbers ``field`` of ``config``; errors as :func:`number`."""
    value: Any = config.get(field)
    whole = isinstance(value, list | tuple) and all(isinstance(entry, int | float) for entry in value)
    if not whole or len(value) != count:
        raise CheckpointError(
            f"config.json: {field} should be a list of {count} numbers, not {value!r}", param=param
        )
    return tuple(map(float, value))


def flag(config: Json, field: str) -> bool:
    """The boolean ``field`` of ``config``; errors as :func:`integer`."""
    value = config.get(field)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} should be true or false, not {value!r}", param=field)
    return value


def vision_activation(name: str, field: str = "hidden_act") -> str:
    """Check the activation ``name`` of a tower or connector, read from ``field``; returns it.

    Raises:
        CheckpointError: it is not supported.
    """
    if name not in VISION_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {field} {name!r} of the vision part is not supported; "
            f"{', '.join(VISION_ACTIVATIONS)} are",
            param=field,
        )
    return name
