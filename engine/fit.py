"""Checks that a configuration fits its model, before anything is loaded."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.families.base import ModelConfig
from engine.layers.decoder_config import DecoderConfig
from engine.vision.transformer_config import VisionConfig


def check_fit(config: EngineConfig, model: ModelConfig) -> None:
    """Check a configuration against its model.

    Raises:
        ConfigError: ``max_model_len`` is more than the model was made for, or it can't be split over
            ``tensor_parallel_size`` ranks; or ``encoder_quantization`` is given for a model without a tower,
            or with one whose sizes fp8 can't have.
    """
    longest_sequence(config, model)
    if config.encoder_quantization is not None:
        _check_tower(model)
    check_split(config.tensor_parallel_size, model.decoder)


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """``max_model_len``, in tokens; errors as :func:`check_fit`."""
    wanted = config.max_model_len or model.max_position
    if wanted > model.max_position:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {model.max_position} tokens",
            param="max_model_len",
        )
    return wanted


def _check_tower(model: ModelConfig) -> None:
    """Check that the matrices of a tower's blocks can be in fp8, which is multiplied in steps of 16."""
    tower: VisionConfig | None = None if model.vision is None else model.vision.tower
    if tower is None:
        raise ConfigError(
            f"encoder_quantization: {model.architecture} has no vision tower", param="encoder_quantization"
        )
    if tower.sandwich:
        raise ConfigError(
            f"encoder_quantization: the encoder of {model.architecture} can't have fp8 matrices",
            param="encoder_quantization",
        )
    sizes = {"hidden size": tower.hidden_size}
    if not tower.gated_mlp:
        # A gated one is padded.
        sizes["intermediate size"] = tower.intermediate_size
    for name, size in sizes.items():
        if size % 16:
            raise ConfigError(
                f"encoder_quantization: the tower's {name} is {size}, and fp8 needs a multiple of 16",
                param="encoder_quantization",
            )


def check_split(size: int, decoder: DecoderConfig) -> None:
    """Check that ``size`` ranks can share a decoder; errors as :func:`check_fit`."""
    possible = [number for number in range(1, decoder.num_heads + 1) if _splits(decoder, number)]
    if size not in possible:
        sizes = " and ".join(map(str, decoder.mlp_sizes))
        raise ConfigError(
            f"tensor_parallel_size is {size}, but a model of {decoder.num_heads} attention heads, "
            f"{decoder.num_kv_heads} KV heads{_linear_heads(decoder)} and an intermediate size of "
            f"{sizes} can be "
            f"split over {', '.join(map(str, possible))} ranks",
            param="tensor_parallel_size",
        )


def _linear_heads(decoder: DecoderConfig) -> str:
    return "" if decoder.recurrence is None else f", {decoder.recurrence}"


def _splits(decoder: DecoderConfig, size: int) -> bool:
    counts = {decoder.heads_of(layer)[0] for layer in range(decoder.num_layers)}
    whole_kv = all(heads % size == 0 or size % heads == 0 for heads in counts)
    if decoder.recurrence is not None and not decoder.recurrence.splits(size):
        return False
    return whole_kv and decoder.num_heads % size == 0 and all(mlp % size == 0 for mlp in decoder.mlp_sizes)
