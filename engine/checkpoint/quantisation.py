"""What config.json says about the numbers that a checkpoint's weights are stored in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError

_FIELD = "quantization_config"
_SUPPORTED = (
    "supported is fp8 (e4m3): quant_method 'fp8', and 'compressed-tensors' with float weights of 8 bits "
    "per tensor, channel or block"
)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the matrices of a checkpoint are stored; those that are stored in fp8 at all, their files say.

    Attributes:
        block: outputs and inputs that share a scale; None if the scales are per tensor or per output.
        rounds_inputs: the checkpoint was made for inputs in fp8.
    """

    block: tuple[int, int] | None
    rounds_inputs: bool


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """Read ``quantization_config`` of a config.json; None if the weights are not quantised.

    Raises:
        CheckpointError: naming the scheme that is not supported, and those that are.
    """
    text = config.get("text_config")
    raw = config.get(_FIELD) or (text.get(_FIELD) if isinstance(text, Mapping) else None)
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise _refused(f"it should be an object, not {raw!r}")
    method = raw.get("quant_method")
    if method == "fp8":
        return _native(raw)
    if method == "compressed-tensors":
        return _compressed_tensors(raw)
    raise _refused(f"quant_method {method!r}")


def _native(raw: Mapping[str, Any]) -> Quantisation:
    scheme = raw.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _refused(f"activation_scheme {scheme!r}")
    if raw.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refused(f"fmt {raw['fmt']!r}")
    if raw.get("scale_fmt", "float") not in ("float", None):
        raise _refused(f"scale_fmt {raw['scale_fmt']!r}")
    return Quantisation(_block(raw.get("weight_block_size")), True)


def _compressed_tensors(raw: Mapping[str, Any]) -> Quantisation:
    if raw.get("sparsity_config"):
        raise _refused("sparsity_config")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups is missing")
    read = {_group(name, group) for name, group in groups.items()}
    if len(read) > 1:
        raise _refused(f"config_groups {sorted(groups)} of different kinds")
    return read.pop()


def _group(name: str, group: Any) -> Quantisation:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(f"config_groups.{name} without weights")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if (kind, bits) != ("float", 8) or strategy not in ("tensor", "channel", "block"):
        raise _refused(f"config_groups.{name}: weights of type {kind}, {bits} bits, strategy {strategy}")
    if weights.get("symmetric", True) is not True:
        raise _refused(f"config_groups.{name}: asymmetric weights")
    inputs = group.get("input_activations")
    if inputs and (inputs.get("type"), inputs.get("num_bits")) != ("float", 8):
        raise _refused(
            f"config_groups.{name}: inputs of type {inputs.get('type')}, {inputs.get('num_bits')} bits"
        )
    block = _block(weights.get("block_structure")) if strategy == "block" else None
    if strategy == "block" and block is None:
        raise _refused(f"config_groups.{name}: strategy block without block_structure")
    return Quantisation(block, bool(inputs))


def _block(value: Any) -> tuple[int, int] | None:
    """Outputs and inputs of a block. A group of inputs must be a power of two that kernels can step by."""
    if value is None:
        return None
    sides = value
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", value):
        sides = [int(side) for side in value.split("x")]
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
        or sides[1] < 16
        or sides[1] & (sides[1] - 1)
    ):
        raise _refused(f"blocks of {value!r}; inputs of a block must be a power of two, at least 16")
    return sides[0], sides[1]


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"config.json: {_FIELD}: {what} is not supported; {_SUPPORTED}", param=_FIELD)
