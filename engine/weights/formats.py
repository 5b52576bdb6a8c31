"""Which of a checkpoint's matrices are stored in fp8, as its files say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint, TensorInfo
from engine.checkpoint.quantisation import Quantisation, read_quantisation
from engine.checkpoint.rules import WeightRules, listing
from engine.errors import CheckpointError
from engine.layers.quantised import Formats, Fp8Format

_FP8 = "F8_E4M3"
_SCALES = ("weight_scale", "weight_scale_inv")
#: The tensors of all experts, whose names don't end in ``weight``.
_OF_EXPERTS = r".*\.experts\.(?:gate_up|down)_proj"
#: Scales of inputs and of the KV cache: rows get scales of their own, and the cache isn't rounded to fp8.
_NOT_LOADED = r".*\.(?:input|activation|q|k|v|kv_cache)_scale"


def rules_with_scales(rules: WeightRules, checkpoint: Checkpoint) -> WeightRules:
    """``rules`` of ``checkpoint``, which may be quantised; errors as :func:`read_quantisation`."""
    if read_quantisation(checkpoint.config) is None:
        return rules
    return replace(rules, ignore=(*rules.ignore, _NOT_LOADED))


def stored_formats(checkpoint: Checkpoint, rules: WeightRules) -> Formats:
    """The formats of the decoder's matrices. Only headers are read.

    Raises:
        CheckpointError: a tensor is in fp8 that can't be, or lacks its scales.
    """
    quantisation = read_quantisation(checkpoint.config)
    parts = rules.assign(checkpoint.tensors)
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
