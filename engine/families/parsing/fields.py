"""Readers of single config.json fields. Each names the field in its error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError

Json = Mapping[str, Any]

#: Activations of MLPs that are computed, and the other names that Transformers has for the same functions.
ACTIVATION_NAMES: dict[Any, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

#: Fields that count layers. Lists as long are made of them, so they have a bound.
_LAYERS = ("num_hidden_layers", "depth", "num_layers")
_MOST_LAYERS = 10_000


def with_aliases(config: Json, aliases: Mapping[str, str]) -> dict[str, Any]:
    """``config``, where each missing field of ``aliases`` has the value of the field that it maps to."""
    return {**{field: config[alias] for field, alias in aliases.items() if alias in config}, **config}


def integer(config: Json, field: str, *, least: int = 1) -> int:
    """The integer ``field`` of ``config``, at least ``least``.

    Raises:
        CheckpointError: the field is missing, null or something else.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise CheckpointError(f"config.json: {field} should be {wanted}, not {value!r}", param=field)
    if field in _LAYERS and value > _MOST_LAYERS:
        raise CheckpointError(
            f"config.json: {field} should be at most {_MOST_LAYERS}, not {value}", param=field
        )
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


def layer_list(config: Json, field: str) -> tuple[int, ...]:
    """The list of indices of layers ``field`` of ``config``; errors as :func:`integer`."""
    value: Any = config.get(field)
    if not isinstance(value, list | tuple) or not all(isinstance(entry, int) for entry in value):
        raise CheckpointError(f"config.json: {field} should be a list of layers, not {value!r}", param=field)
    return tuple(value)


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


def activation(name: Any, field: str = "hidden_act", part: str = "") -> str:
    """The activation ``name``, read from ``field``, as kernels call it.

    Args:
        part: of the model, for the message, e.g. ``" of the vision part"``.

    Raises:
        CheckpointError: it is not supported.
    """
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise CheckpointError(
            f"config.json: {field} {name!r}{part} is not supported; {', '.join(ACTIVATION_NAMES)} are",
            param=field,
        )
    return ACTIVATION_NAMES[name]


def vision_activation(name: Any, field: str = "hidden_act") -> str:
    """Return :func:`activation` of a tower or connector."""
    return activation(name, field, " of the vision part")
