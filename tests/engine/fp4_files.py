"""Rewrites tiny checkpoints with matrices in floats of 4 bits, in the layouts of public ones.

The packers follow the definitions of compressed-tensors and of NVIDIA's ModelOpt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.engine.quantised_files import MATRIX, rewrite

NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LAYOUTS = ("mxfp4-pack-quantized", "nvfp4-pack-quantized", "modelopt")


def config(layout: str, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint."""
    if layout == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(ignored)}
    nv = layout.startswith("nvfp4")
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if nv else "group",
        "group_size": 16 if nv else 32,
    }
    inputs = {"num_bits": 4, "type": "float", "dynamic": "local", "group_size": 16} if nv else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {**group, "format": layout}},
        "ignore": list(ignored),
    }


def tensors(layout: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a matrix ``(N, K)`` without their stem, and the matrix in float32 that they mean."""
    group = 32 if layout.startswith("mxfp4") else 16
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.abs().amax(2)
    found: dict[str, torch.Tensor] = {}
    if group == 32:
        power = largest.clamp(min=1e-6).log2().floor() - 2
        found["weight_scale"], scale = (power + 127).to(torch.uint8), power.exp2()
    else:
        whole = 448 * 6 / weight.abs().amax()
        stored = (largest / 6 * whole).to(torch.float8_e4m3fn)
        if layout == "modelopt":
            found |= {"weight_scale": stored, "weight_scale_2": 1 / whole, "input_scale": torch.tensor(0.3)}
            scale = stored.float() * found["weight_scale_2"]
        else:
            found |= {"weight_scale": stored, "weight_global_scale": whole[None]}
            found["input_global_scale"] = torch.tensor([3.0])
            scale = stored.float() / whole
    sizes = padded / scale.clamp(min=1e-30)[:, :, None]
    bits = (sizes.abs()[..., None] - NUMBERS).abs().argmin(-1)
    exact = (NUMBERS[bits] * sizes.sign() * scale[:, :, None]).flatten(1)[:, : weight.shape[1]]
    codes = (bits + 8 * (sizes < 0)).flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    found["weight" if layout == "modelopt" else "weight_packed"] = pairs
    return found, exact


def quantise(path: Path, layout: str, *, matrix: str = MATRIX) -> dict[str, torch.Tensor]:
    """Round the matrices of a checkpoint; all tensors of a checkpoint of the same model in float32."""

    def rounding(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found, exact = tensors(layout, weight)
        return {name.removesuffix("weight") + kind: values for kind, values in found.items()}, exact

    return rewrite(path, rounding, partial(config, layout), matrix=matrix)
