"""Finds the quantised matrices of a checkpoint by its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from engine.checkpoint.folder import Checkpoint, TensorInfo
from engine.checkpoint.quantisation import (
    Fp4Quantisation,
    Int4Quantisation,
    Quantisation,
    read_quantisation,
)
from engine.checkpoint.rules import WeightRules, listing
from engine.errors import CheckpointError
from engine.layers.matrix_formats import (
    FP4_NAMES,
    INT4_NAMES,
    Formats,
    Fp4Format,
    Fp8Format,
    Int4Format,
    PackedFormat,
)
from engine.weights.reader import DTYPES

_FP8 = "F8_E4M3"
_SCALES = ("weight_scale", "weight_scale_inv")
#: The dtypes of int4's scales.
INT4_SCALES = {name: DTYPES[name] for name in ("F16", "BF16", "F32")}
#: The tensors of all experts, whose names don't end in ``weight``.
_OF_EXPERTS = r".*\.experts\.(?:gate_up|down)_proj"
#: Scales of keys and values.
_OF_CACHE = r".*self_attn\.(?:[kv]_proj\.)?[kv]_scale"
#: Scales of inputs and queries, which get scales of their own or none.
_NOT_LOADED = r".*\.(?:(?:input|activation|q|kv_cache)_scale|input_global_scale|weight_shape)"


def rules_with_scales(rules: WeightRules, checkpoint: Checkpoint) -> WeightRules:
    """``rules`` of ``checkpoint``, which may be quantised; errors as :func:`read_quantisation`."""
    if read_quantisation(checkpoint) is None:
        return rules
    return replace(rules, ignore=(*rules.ignore, _NOT_LOADED))


def stored_formats(checkpoint: Checkpoint, rules: WeightRules) -> Formats:
    """The formats of the decoder's matrices, and of the scales of its KV cache. Only headers are read.

    Raises:
        CheckpointError: a tensor is quantised that can't be, or lacks its scales.
    """
    shapes = [info.shape for name, info in checkpoint.tensors.items() if re.fullmatch(_OF_CACHE, name)]
    return replace(_of_matrices(checkpoint, rules), head_scales=any(prod(shape) > 1 for shape in shapes))


def stated_formats(checkpoint: Checkpoint) -> Formats:
    """The format that config.json states, for all matrices of the decoder's layers: there may be no tensors
    that say which of them have it. Inputs of a group are consecutive, and int4 has zero points.

    Errors as :func:`read_quantisation`.
    """
    quantisation = read_quantisation(checkpoint)
    if quantisation is None:
        return Formats()
    if isinstance(quantisation, Int4Quantisation):
        return Formats(every=Int4Format(quantisation.layout, quantisation.group))
    if isinstance(quantisation, Fp4Quantisation):
        of_scales = "F8_E8M0" if quantisation.layout.startswith("mxfp4") else "F8_E4M3"
        return Formats(every=Fp4Format(quantisation.layout, DTYPES[of_scales]))
    inputs = quantisation.rounds_inputs
    if quantisation.block is not None:
        return Formats(every=Fp8Format("weight_scale_inv", "block", quantisation.block, inputs))
    return Formats(every=Fp8Format("weight_scale", "output", round_inputs=inputs))


def _of_matrices(checkpoint: Checkpoint, rules: WeightRules) -> Formats:
    quantisation = read_quantisation(checkpoint)
    parts = rules.assign(checkpoint.tensors)
    if isinstance(quantisation, Int4Quantisation | Fp4Quantisation):
        return _in_4_bits(parts["language"], parts["vision"], checkpoint.tensors, quantisation)
    for names in parts.values():
        _check_floats(names.values(), checkpoint.tensors)
    fp8 = {
        part: {inner: name for inner, name in names.items() if checkpoint.tensors[name].dtype == _FP8}
        for part, names in parts.items()
    }
    found = [name for names in fp8.values() for name in names.values()]
    if found and quantisation is None:
        raise CheckpointError(f"tensors in fp8, but config.json has no quantization_config: {listing(found)}")
    unsupported = [name for inner, name in fp8["language"].items() if not inner.startswith("layers.")]
    unsupported += fp8["vision"].values()
    if unsupported:
        raise CheckpointError(
            f"tensors in fp8 that are no matrix of a decoder layer are not supported: {listing(unsupported)}"
        )
    if quantisation is None:
        return Formats()
    names = parts["language"]
    return Formats(
        {
            inner.removesuffix(".weight"): _format(inner, names, checkpoint.tensors, quantisation)
            for inner in fp8["language"]
        }
    )


def _check_floats(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> None:
    for name in names:
        if tensors[name].dtype.startswith(("I", "U")):
            raise CheckpointError(
                f"tensor {name} in {tensors[name].file.name} has dtype {tensors[name].dtype}; only "
                "floating-point weights are supported, and weights in 4 bits as quantization_config says"
            )


def _in_4_bits(
    language: Mapping[str, str],
    vision: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    quantisation: Int4Quantisation | Fp4Quantisation,
) -> Formats:
    """The formats of a checkpoint with matrices in 4 bits."""
    kinds = {**INT4_NAMES, **FP4_NAMES}[quantisation.layout]
    stems = {
        inner.removesuffix(kinds[0])
        for inner, name in language.items()
        if inner.endswith(f".{kinds[0]}") and tensors[name].dtype in ("I32", "U8")
    }
    belonging = {stem + kind for stem in stems for kind in kinds}
    _check_floats(vision.values(), tensors)
    _check_floats([name for inner, name in language.items() if inner not in belonging], tensors)
    unsupported = [language[stem + kinds[0]] for stem in stems if not stem.startswith("layers.")]
    if unsupported:
        raise CheckpointError(
            f"tensors in 4 bits that are no matrix of a decoder layer are not supported: "
            f"{listing(unsupported)}"
        )
    return Formats({stem[:-1]: _packed_format(stem, language, tensors, quantisation) for stem in stems})


def _packed_format(
    stem: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    quantisation: Int4Quantisation | Fp4Quantisation,
) -> PackedFormat:
    if isinstance(quantisation, Int4Quantisation):
        return _int4_format(stem, names, tensors, quantisation)
    numbers, scales, factor = FP4_NAMES[quantisation.layout]
    for kind in (scales, factor):
        if kind and stem + kind not in names:
            raise CheckpointError(f"tensor {names[stem + numbers]} is in 4 bits and has no {kind}")
    stored = tensors[names[stem + scales]].dtype
    allowed = ("U8", "F8_E8M0") if quantisation.layout.startswith("mxfp4") else ("F8_E4M3",)
    if stored not in allowed:
        raise CheckpointError(
            f"tensor {names[stem + scales]} has dtype {stored}; scales of {quantisation.layout} should be "
            f"{' or '.join(allowed)}"
        )
    return Fp4Format(quantisation.layout, DTYPES[stored])


def _int4_format(
    stem: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    quantisation: Int4Quantisation,
) -> Int4Format:
    words, zeros, scales, index = INT4_NAMES[quantisation.layout]
    if stem + scales not in names:
        raise CheckpointError(f"tensor {names[stem + words]} is in int4 and has no scales")
    stored = tensors[names[stem + scales]].dtype
    if stored not in INT4_SCALES:
        allowed = ", ".join(INT4_SCALES)
        raise CheckpointError(
            f"tensor {names[stem + scales]} has dtype {stored}; scales of int4 should be {allowed}"
        )
    return Int4Format(
        quantisation.layout,
        quantisation.group,
        zeros=stem + zeros in names,
        indexed=stem + index in names,
        shuffled=quantisation.shuffled and stem + index in names,
        less_one=quantisation.less_one,
        scale_dtype=INT4_SCALES[stored],
    )


def _format(
    weight: str, names: Mapping[str, str], tensors: Mapping[str, TensorInfo], quantisation: Quantisation
) -> Fp8Format:
    together = re.fullmatch(_OF_EXPERTS, weight) is not None
    stem = weight.removesuffix("weight")
    scales = {kind: f"{weight}_{kind[7:]}" if together else stem + kind for kind in _SCALES}
    kind = next((kind for kind, name in scales.items() if name in names), None)
    if kind is None or (stem == weight and not together):
        raise CheckpointError(f"tensor {names[weight]} is in fp8 and has no scales")
    shape = tensors[names[scales[kind]]].shape
    count = 1
    for side in shape:
        count *= side
    if quantisation.block is not None:
        return Fp8Format(kind, "block", quantisation.block, quantisation.rounds_inputs)
    return Fp8Format(kind, "tensor" if count == 1 else "output", round_inputs=quantisation.rounds_inputs)
