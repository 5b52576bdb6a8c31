"""Reads the sliding attention windows of a language model from its config.json."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, integer


def parse_windows(config: Json, layers: int, context: int) -> tuple[int | None, ...]:
    """Read the sliding window of each layer.

    Mistral, Phi-3 and Qwen3-MoE have ``sliding_window`` for all layers, Qwen2 and Qwen3 also have
    ``use_sliding_window`` and a choice of layers, Gemma 3 has a choice of layers, Llama has none.

    Args:
        config: the fields of config.json over the defaults of the kind.
        layers: number of layers.
        context: tokens of the longest sequence; a window of that size or more hides nothing.

    Returns:
        Windows in tokens, None for layers with full attention; empty if all have it.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if "sliding_window" not in config:
        return ()
    if "sliding_window_pattern" in config:
        window = _window(config, context)
        return (
            tuple(window if slides else None for slides in sliding_layers(config, layers)) if window else ()
        )
    if "max_window_layers" not in config:
        window = _window(config, context) if config.get("use_sliding_window", True) else None
        return (window,) * layers if window else ()
    sliding = _sliding_layers(config, layers)
    if not any(sliding):
        return ()
    window = _window(config, context)
    return tuple(window if slides else None for slides in sliding) if window else ()


def sliding_layers(config: Json, layers: int) -> list[bool]:
    """Return per layer of a Gemma 3 whether it uses a window: by ``layer_types``, or all but each last one of
    ``sliding_window_pattern``.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if config["layer_types"] is None:
        pattern = integer(config, "sliding_window_pattern")
        return [bool((layer + 1) % pattern) for layer in range(layers)]
    return _named_layers(config["layer_types"], layers)


def local_layers(config: Json, layers: int) -> tuple[int, ...]:
    """Return the layers with a rotary embedding of their own: those with a window, those that
    ``no_rope_layers`` says don't rotate, or those that ``rope_scaling_layers`` doesn't name.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if "rope_scaling_layers" in config:
        return unscaled_layers(config, layers)
    if "no_rope_layers" not in config:
        return tuple(layer for layer, slides in enumerate(sliding_layers(config, layers)) if slides)
    if config.get("use_sliding_window"):
        raise CheckpointError(
            "config.json: use_sliding_window is not supported for this architecture",
            param="use_sliding_window",
        )
    rotates: Any = config["no_rope_layers"]
    if rotates is None:
        interval = integer(config, "no_rope_layer_interval")
        rotates = [(layer + 1) % interval for layer in range(layers)]
    if not isinstance(rotates, list | tuple) or len(rotates) != layers:
        raise CheckpointError(
            f"config.json: no_rope_layers should have a number for each of {layers} layers",
            param="no_rope_layers",
        )
    return tuple(layer for layer, each in enumerate(rotates) if not each)


def unscaled_layers(config: Json, layers: int) -> tuple[int, ...]:
    """Return the layers that ``rope_scaling_layers`` doesn't name, if it names any.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    scaled = config["rope_scaling_layers"]
    if scaled is None:
        return ()
    if not isinstance(scaled, list | tuple) or not all(type(layer) is int for layer in scaled):
        raise CheckpointError(
            f"config.json: rope_scaling_layers should be numbers of layers, not {scaled!r}",
            param="rope_scaling_layers",
        )
    return tuple(layer for layer in range(layers) if layer not in scaled)


def window_rotates(config: Json, layers: int) -> dict[str, Any]:
    """Return ``config`` with the field by which SmolLM3 names the layers that rotate: those with a window.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    slides = sliding_layers(config, layers)
    if any(slides):
        integer(config, "sliding_window")
    return {**config, "no_rope_layers": [int(each) for each in slides]}


def _window(config: Json, context: int) -> int | None:
    if config["sliding_window"] is None:
        return None
    window = integer(config, "sliding_window")
    return window if window < context else None


def _sliding_layers(config: Json, layers: int) -> list[bool]:
    """Return per layer whether a Qwen uses a window: by ``layer_types``, or from ``max_window_layers`` on."""
    used = bool(config["use_sliding_window"]) and config["sliding_window"] is not None
    types: Any = config["layer_types"]
    if types is None:
        first = integer(config, "max_window_layers", least=0) if used else layers
        return [index >= first for index in range(layers)]
    named = _named_layers(types, layers)
    if "sliding_attention" in types and not used:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but no window is set: use_sliding_window "
            "should be true and sliding_window its size",
            param="layer_types",
        )
    return named


def _named_layers(types: Any, layers: int) -> list[bool]:
    known = {"full_attention": False, "attention": False, "sliding_attention": True}
    if not isinstance(types, list | tuple) or [name in known for name in map(str, types)] != [True] * layers:
        raise CheckpointError(
            f"config.json: layer_types should name full_attention or sliding_attention for each of {layers} "
            f"layers, not {types!r}",
            param="layer_types",
        )
    return [known[name] for name in types]
