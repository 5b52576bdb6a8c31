"""Rewrites tiny checkpoints with fp8 matrices, in the layouts of public ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.engine.quantised_files import MATRIX, rewrite


@dataclass(frozen=True)
class Scheme:
    """A layout of fp8 checkpoints.

    Attributes:
        native: ``quant_method`` fp8, else compressed-tensors.
        shared: the numbers that share a scale.
        static: the checkpoint has scales for inputs.
    """

    native: bool
    shared: Literal["tensor", "channel", "block"]
    static: bool = False
    block: tuple[int, int] = (24, 16)

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config``."""
        if self.native:
            return {
                "quant_method": "fp8",
                "activation_scheme": "static" if self.static else "dynamic",
                "weight_block_size": list(self.block) if self.shared == "block" else None,
                "modules_to_not_convert": ignored,
            }
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": self.shared}
        if self.shared == "block":
            weights["block_structure"] = list(self.block)
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": not self.static}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales of a matrix, in their shape in files."""
        largest = weight.abs()
        if self.shared == "tensor":
            return largest.amax().reshape(() if self.native else (1,)) / 448
        if self.shared == "channel":
            return largest.amax(1, keepdim=True) / 448
        rows, columns = (range(0, n, b) for n, b in zip(weight.shape, self.block, strict=True))
        blocks = [
            [largest[r : r + self.block[0], c : c + self.block[1]].amax() for c in columns] for r in rows
        ]
        return torch.tensor(blocks) / 448

    def expand(self, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The scale of each number of a matrix."""
        if self.shared != "block":
            return scale.expand(shape)
        wide = scale.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return wide[: shape[0], : shape[1]]


def quantise(
    path: Path, scheme: Scheme, *, ignored: str = "$^", matrix: str = MATRIX
) -> dict[str, torch.Tensor]:
    """Round the matrices of a checkpoint to fp8, but for those whose names match ``ignored``.

    Returns:
        All tensors of a checkpoint of the same model without quantisation.
    """

    def rounding(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        stem, scale = name.removesuffix("weight"), scheme.scale(weight)
        wide = scheme.expand(scale, weight.shape)
        rounded = (weight / wide).to(torch.float8_e4m3fn)
        made = {name: rounded, stem + ("weight_scale_inv" if scheme.native else "weight_scale"): scale}
        if scheme.static:
            made[stem + ("activation_scale" if scheme.native else "input_scale")] = torch.tensor(0.01)
            if not scheme.native and stem.endswith("q_proj."):
                made[stem.removesuffix("q_proj.") + "k_scale"] = torch.ones(1)
        return made, rounded.float() * wide

    return rewrite(path, rounding, scheme.config, ignored=ignored, matrix=matrix)
