"""The formats in which checkpoints store the matrices of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from engine.errors import CheckpointError

#: The tensors of an int4 matrix by layout: words, zero points, scales, and the group of each input.
INT4_NAMES: dict[str, tuple[str, str, str, str]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales", ""),
    "packed": ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"),
}
#: The tensors of a matrix in floats of 4 bits by layout: numbers, scales, and the factor of all scales. A
#: file of compressed-tensors names what its scales were multiplied by, so they are divided by it.
FP4_NAMES: dict[str, tuple[str, str, str]] = {
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale", ""),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
}


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """The storage format of one fp8 matrix ``(N, K)``.

    Attributes:
        scale: the kind of the tensor with its scales, e.g. ``weight_scale``; None if the stored matrix is not
            quantised and is rounded to fp8 as it is read, with a scale for each output.
        shared: the numbers that share a scale: of the whole tensor, of an output, or of a block.
        block: outputs and inputs of a block.
        round_inputs: see :class:`~engine.kernels.fp8.Scale`.
    """

    scale: str | None
    shared: Literal["tensor", "output", "block"]
    block: tuple[int, int] = (1, 1)
    round_inputs: bool = True

    @property
    def label(self) -> str:
        return f"fp8 {self.shared}"


@dataclass(frozen=True, slots=True)
class Int4Format:
    """The storage format of one int4 matrix ``(N, K)``. ``G`` is the number of groups of inputs.

    Attributes:
        layout: ``gptq`` has words of eight inputs, ``(K / 8, N)``; ``awq`` of eight outputs, ``(K, N / 8)``;
            both have zero points ``(G, N / 8)`` and scales ``(G, N)``. ``packed`` (compressed-tensors) has
            words of eight inputs, ``(N, K / 8)``, zero points ``(N / 8, G)`` and scales ``(N, G)``.
        group: inputs that share a scale; None for all.
        zeros: the file has zero points; all are 8 otherwise.
        indexed: the file has the group of each input.
        shuffled: inputs of a group may be apart ("activation order").
        less_one: zero points are stored less one.
        scale_dtype: of the scales in the file, which they keep.
    """

    layout: Literal["gptq", "awq", "packed"]
    group: int | None
    zeros: bool = True
    indexed: bool = False
    shuffled: bool = False
    less_one: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def label(self) -> str:
        return f"int4 {self.layout}"


@dataclass(frozen=True, slots=True)
class Fp4Format:
    """The storage format of one matrix ``(N, K)`` in floats of 4 bits (e2m1).

    Two consecutive inputs are in a byte of ``(N, K / 2)``, the first in the lower bits. Scales are
    ``(N, G)``.

    Attributes:
        layout: a key of :data:`FP4_NAMES`.
        scale_dtype: of the scales in the file.
    """

    layout: Literal["mxfp4-pack-quantized", "nvfp4-pack-quantized", "modelopt"]
    scale_dtype: torch.dtype

    @property
    def kind(self) -> Literal["mxfp4", "nvfp4"]:
        """The ``kind`` of :class:`~engine.kernels.int4.Int4Scale`."""
        return "mxfp4" if self.layout.startswith("mxfp4") else "nvfp4"

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return 32 if self.kind == "mxfp4" else 16

    @property
    def label(self) -> str:
        return self.kind


PackedFormat = Int4Format | Fp4Format


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a model's matrices.

    Attributes:
        by_name: those that are quantised, by the layer's name in the model's part.
        every: the format of all linear layers of the decoder that ``by_name`` lacks; None: the model's dtype.
        head_scales: scales of keys and values in fp8 are one for each KV head, not one for a layer.
    """

    by_name: Mapping[str, Fp8Format | PackedFormat] = field(default_factory=dict)
    every: Fp8Format | PackedFormat | None = None
    head_scales: bool = False

    def of(self, parts: Iterable[str], fused: str) -> Fp8Format | PackedFormat | None:
        """The format of a layer that a checkpoint stores as ``parts``, or all together as ``fused``.

        Raises:
            CheckpointError: the parts have different formats.
        """
        if fused in self.by_name:
            return self.by_name[fused]
        found = {name: self.by_name.get(name, self.every) for name in parts}
        if len(set(found.values())) > 1:
            kinds = ", ".join(f"{name} {f.label if f else 'not'}" for name, f in found.items())
            raise CheckpointError(f"projections of one layer must be quantised alike: {kinds}")
        return next(iter(found.values()))
