"""Reads from config.json in which number format a checkpoint's weights are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError

_FIELD = "quantization_config"
#: The parts of config.json that may have the field: quantisers write it where they find the language model.
_PARTS = ("text_config", "llm_config", "vlm_config")
_SUPPORTED = (
    "supported is fp8 (e4m3): quant_method 'fp8', and 'compressed-tensors' with float weights of 8 bits "
    "per tensor, channel or block; and int4 weights with a scale for 16, 32, 64, a multiple of 128, or all "
    "inputs: quant_method 'gptq', 'awq' (version gemm), and 'compressed-tensors' (pack-quantized); and "
    "floats of 4 bits: quant_method 'compressed-tensors' (mxfp4-pack-quantized, nvfp4-pack-quantized), and "
    "'modelopt' with quant_algo NVFP4 or FP8"
)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The storage format of a checkpoint's fp8 matrices. Its tensors say which matrices are in fp8.

    Attributes:
        block: outputs and inputs that share a scale; None if the scales are per tensor or per output.
        rounds_inputs: the checkpoint was made for inputs in fp8.
    """

    block: tuple[int, int] | None
    rounds_inputs: bool


@dataclass(frozen=True, slots=True)
class Int4Quantisation:
    """The storage format of a checkpoint's int4 matrices. Its tensors say which matrices are in int4.

    Attributes:
        layout: see :class:`~engine.layers.matrix_formats.Int4Format`; also of ``shuffled`` and ``less_one``.
        group: inputs that share a scale; None for all.
    """

    layout: Literal["gptq", "awq", "packed"]
    group: int | None
    shuffled: bool = False
    less_one: bool = False


@dataclass(frozen=True, slots=True)
class Fp4Quantisation:
    """The storage format of a checkpoint's matrices in floats of 4 bits. Its tensors say which matrices are.

    Attributes:
        layout: see :class:`~engine.layers.matrix_formats.Fp4Format`.
    """

    layout: Literal["mxfp4-pack-quantized", "nvfp4-pack-quantized", "modelopt"]


AnyQuantisation = Quantisation | Int4Quantisation | Fp4Quantisation


def read_quantisation(checkpoint: Checkpoint) -> AnyQuantisation | None:
    """Read ``quantization_config`` of a config.json or its parts; None if the weights are not quantised.

    Model Optimizer states the scheme in ``hf_quant_config.json``, of late in config.json as well.

    Raises:
        CheckpointError: naming the scheme that is not supported, and those that are.
    """
    config = checkpoint.config
    parts = (config.get(name) for name in _PARTS)
    nested = (part.get(_FIELD) for part in parts if isinstance(part, Mapping))
    raw = config.get(_FIELD) or next(filter(None, nested), None) or _exported(checkpoint)
    return parse_quantisation(raw) if raw else None


def _exported(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    stated = checkpoint.json("hf_quant_config.json").get("quantization")
    if not isinstance(stated, Mapping) or stated.get("quant_algo") is None:
        return None
    return {**stated, "quant_method": "modelopt"}


def parse_quantisation(raw: Any) -> AnyQuantisation:
    """The scheme that ``raw``, a ``quantization_config``, states; errors as :func:`read_quantisation`."""
    if not isinstance(raw, Mapping):
        raise _refused(f"it should be an object, not {raw!r}")
    method = raw.get("quant_method")
    if method == "fp8":
        return _native(raw)
    if method == "compressed-tensors":
        return _compressed_tensors(raw)
    if method == "gptq":
        return _gptq(raw)
    if method == "awq":
        return _awq(raw)
    if method == "modelopt":
        return _modelopt(raw)
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


def _gptq(raw: Mapping[str, Any]) -> Int4Quantisation:
    _check_bits(raw.get("bits"))
    # Files of the first releases don't state the version, which is 1.
    version = raw.get("checkpoint_format", raw.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2"):
        raise _refused(f"checkpoint_format {version!r}")
    if raw.get("pack_dtype", "int32") != "int32":
        raise _refused(f"pack_dtype {raw['pack_dtype']!r}")
    for pattern, change in (raw.get("dynamic") or {}).items():
        # A pattern with a minus names modules that are left alone.
        if not pattern.startswith("-:") and change:
            raise _refused(f"dynamic {pattern!r}")
    return Int4Quantisation(
        "gptq", _inputs_of_group(raw.get("group_size")), bool(raw.get("desc_act")), version == "gptq"
    )


def _awq(raw: Mapping[str, Any]) -> Int4Quantisation:
    _check_bits(raw.get("bits", raw.get("w_bit")))
    version = raw.get("version", raw.get("format", "gemm"))
    if str(version).lower() != "gemm":
        raise _refused(f"version {version!r}")
    if raw.get("zero_point", True) is not True:
        raise _refused(f"zero_point {raw['zero_point']!r}")
    return Int4Quantisation("awq", _inputs_of_group(raw.get("group_size", raw.get("q_group_size"))))


def _modelopt(raw: Mapping[str, Any]) -> Quantisation | Fp4Quantisation:
    if raw.get("quant_algo") == "FP8":
        return Quantisation(None, True)
    if raw.get("quant_algo") != "NVFP4":
        raise _refused(f"quant_algo {raw.get('quant_algo')!r}")
    if raw.get("group_size", 16) != 16:
        raise _refused(f"group_size {raw['group_size']!r} of NVFP4")
    return Fp4Quantisation("modelopt")


def _check_bits(bits: Any) -> None:
    if bits != 4:
        raise _refused(f"bits {bits!r}")


def _inputs_of_group(size: Any) -> int | None:
    """Inputs that share a scale; None for all, which files write as -1."""
    if size == -1:
        return None
    if not isinstance(size, int) or not (size in (16, 32, 64) or (size > 0 and size % 128 == 0)):
        raise _refused(f"group_size {size!r}")
    return size


def _compressed_tensors(raw: Mapping[str, Any]) -> AnyQuantisation:
    if raw.get("sparsity_config"):
        raise _refused("sparsity_config")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups is missing")
    read = {_group(name, group, raw.get("format")) for name, group in groups.items()}
    if len(read) > 1:
        raise _refused(f"config_groups {sorted(groups)} of different kinds")
    return read.pop()


def _group(name: str, group: Any, layout: Any) -> AnyQuantisation:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(f"config_groups.{name} without weights")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if (kind, bits) == ("int", 4) and strategy in ("group", "channel"):
        return _packed(name, group, weights, group.get("format") or layout)
    if (kind, bits) == ("float", 4):
        return _floats(name, weights, group.get("format") or layout)
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


def _packed(name: str, group: Mapping[str, Any], weights: Mapping[str, Any], layout: Any) -> Int4Quantisation:
    if layout != "pack-quantized":
        raise _refused(f"config_groups.{name}: weights of type int, 4 bits, in format {layout!r}")
    if group.get("input_activations"):
        raise _refused(f"config_groups.{name}: input_activations beside int4 weights")
    size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
    # The other orders of activations are gone once weights are stored.
    shuffled = weights.get("actorder") in ("group", "dynamic", True)
    return Int4Quantisation("packed", _inputs_of_group(size), shuffled)


def _floats(name: str, weights: Mapping[str, Any], layout: Any) -> Fp4Quantisation:
    """Floats of 4 bits. Inputs may be stated as such floats too: they are not rounded here."""
    if layout not in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        raise _refused(f"config_groups.{name}: weights of type float, 4 bits, in format {layout!r}")
    size = 32 if layout.startswith("mxfp4") else 16
    if weights.get("group_size", size) != size:
        raise _refused(f"config_groups.{name}: group_size {weights['group_size']!r} of {layout}")
    return Fp4Quantisation(layout)


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
