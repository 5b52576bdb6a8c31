"""Fields that the image processors' JSON files have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.parsing.fields import vision_activation
from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import Normalisation


def parse_normalisation(raw: Mapping[str, Any], default: Normalisation) -> Normalisation:
    """The normalisation that an image processor's JSON states, with ``default`` for missing fields.

    A step that is switched off, by ``do_rescale`` or ``do_normalize``, leaves pixels as they are.

    Raises:
        CheckpointError: naming the field that is no number, or for colours neither one nor three of them.
    """
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale = 1.0
    if raw.get("do_normalize", True):
        mean = _three(raw, "image_mean", default.mean)
        std = _three(raw, "image_std", default.std)
    if raw.get("do_rescale", True):
        scale = raw.get("rescale_factor", default.scale)
        if not isinstance(scale, int | float):
            raise CheckpointError(f"rescale_factor should be a number, not {scale!r}", param="rescale_factor")
    return Normalisation(mean, std, scale)


def _three(raw: Mapping[str, Any], field: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value: Any = raw.get(field) or default
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),) * 3
    whole = isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)
    if not whole or len(value) != 3:
        raise CheckpointError(f"{field} should be a number or three, not {value!r}", param=field)
    return tuple(value)


def stated_size(raw: Mapping[str, Any], field: str = "size", *, square: bool = True) -> dict[str, int]:
    """The sides that an image processor's JSON states in ``field``, by their names; empty if it states none.

    Args:
        square: whether a single number, as files of early releases have it, is both sides, ``height`` and
            ``width``, or the ``shortest_edge``. A pair is always height and width.

    Raises:
        CheckpointError: it is no number of pixels, no pair and no object of such numbers.
    """
    stated = raw.get(field)
    size: Any = {} if stated is None else stated
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    lengths = [length for length in size.values() if length is not None] if isinstance(size, Mapping) else [0]
    if not all(map(_is_length, lengths)):
        raise CheckpointError(
            f"{field} should be shortest_edge, longest_edge, or height and width, in pixels; got {stated!r}",
            param=field,
        )
    return {name: length for name, length in size.items() if length is not None}


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def mean_colour(raw: Mapping[str, Any], default: Normalisation) -> tuple[int, ...]:
    """The colour with which an image is padded to a square: ``image_mean`` in bytes, rounded down as in
    Transformers, whether or not pixels are normalised by it."""
    return tuple(int(value * 255) for value in _three(raw, "image_mean", default.mean))


def parse_projector(raw: Mapping[str, Any]) -> MLPConfig:
    """The MLP connector that the config.json of the LLaVA families states."""
    activation = vision_activation(raw.get("projector_hidden_act", "gelu"), "projector_hidden_act")
    return MLPConfig(activation, raw.get("multimodal_projector_bias", True))


def require_steps(raw: Mapping[str, Any], *steps: str) -> None:
    """Refuse a processor that leaves out one of ``steps``, e.g. ``do_resize``.

    Raises:
        CheckpointError: naming the step.
    """
    for step in steps:
        if not raw.get(step, True):
            raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)


def require_same_colours(video: Mapping[str, Any], image: Normalisation, default: Normalisation) -> None:
    """Refuse videos that are normalised otherwise than images: the encoder has one normalisation.

    Args:
        video: the video processor's JSON.
        image: the normalisation of images.
        default: the normalisation of videos where the JSON states none.

    Raises:
        CheckpointError: naming the field.
    """
    theirs = parse_normalisation(video, default)
    for field, ours, stated in (
        ("image_mean", image.mean, theirs.mean),
        ("image_std", image.std, theirs.std),
        ("rescale_factor", image.scale, theirs.scale),
    ):
        if ours != stated:
            raise CheckpointError(
                f"video_preprocessor_config.json: {field} differs from the one for images", param=field
            )


def flag_option(options: Mapping[str, Any], name: str, default: Any) -> bool:
    """The user's option ``name``, or ``default`` without it: what a file states, or what it means by default.

    Raises:
        ConfigError: naming the option; the value is neither true nor false.
    """
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise bad_option(name, value, "true or false")
    return value


def count_option(options: Mapping[str, Any], name: str, default: int, most: int) -> int:
    """The user's option ``name``, an integer from 1 to ``most``, or ``default`` without it.

    Raises:
        ConfigError: naming the option.
    """
    if name not in options:
        return default
    value = options[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise bad_option(name, value, f"an integer from 1 to {most}")
    return value


def request_options(options: Mapping[str, Any], *known: str) -> Mapping[str, Any]:
    """A request's ``mm_processor_kwargs`` without nulls, once all are known.

    Raises:
        InvalidRequest: naming one that isn't.
    """
    for name in options:
        if name not in known:
            offered = f"it has {', '.join(known)}" if known else "it has none"
            raise _bad_request(name, f"this model has no such option for requests; {offered}")
    return {name: value for name, value in options.items() if value is not None}


def lowered(options: Mapping[str, Any], name: str, most: int) -> int:
    """A request's option ``name``, an integer from 1 to the configured value, ``most``; that without it.

    Raises:
        InvalidRequest: naming the option.
    """
    value = options.get(name, most)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _bad_request(
            name, f"it must be an integer from 1 to {most}, the configured value; got {value!r}"
        )
    return value


def lowered_flag(options: Mapping[str, Any], name: str, most: bool) -> bool:
    """A request's option ``name``, which may turn off what the configuration has on; errors as
    :func:`lowered`."""
    value = options.get(name, most)
    if not isinstance(value, bool) or value > most:
        raise _bad_request(name, f"it must be {'true or false' if most else 'false'}; got {value!r}")
    return value


def _bad_request(name: str, why: str) -> InvalidRequest:
    where = f"mm_processor_kwargs.{name}"
    return InvalidRequest(f"{where}: {why}.", param=where)


def bad_option(name: str, value: Any, wanted: str) -> ConfigError:
    """The error for an option of ``mm_processor_kwargs`` whose value is not ``wanted``."""
    return ConfigError(
        f"mm_processor_kwargs: {name} should be {wanted}; got {value!r}",
        param=f"mm_processor_kwargs.{name}",
    )
