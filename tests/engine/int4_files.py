"""Rewrites tiny checkpoints with int4 matrices, in the layouts of public ones.

The packers follow the definitions of the formats: GPTQ and AWQ as GPTQModel reads them, and pack-quantized of
compressed-tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.engine.quantised_files import MATRIX, rewrite

#: Outputs of a word of AWQ, from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """A layout of int4 checkpoints.

    Attributes:
        layout: ``gptq``, ``gptq_v2``, ``awq`` or ``packed`` (compressed-tensors).
        group: inputs that share a scale; -1 for all.
        symmetric: all zero points are 8.
        shuffled: inputs of a group are apart.
    """

    layout: Literal["gptq", "gptq_v2", "awq", "packed"]
    group: int = 16
    symmetric: bool = False
    shuffled: bool = False

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config``."""
        common = {"bits": 4, "group_size": self.group}
        if self.layout == "awq":
            return {
                "quant_method": "awq",
                **common,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": ignored or None,
            }
        if self.layout != "packed":
            return {
                "quant_method": "gptq",
                **common,
                "sym": self.symmetric,
                "desc_act": self.shuffled,
                "checkpoint_format": self.layout,
            }
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group == -1 else "group",
            "group_size": None if self.group == -1 else self.group,
            "actorder": "group" if self.shuffled else None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ignored,
        }

    def quantise(self, weight: torch.Tensor, index: torch.Tensor) -> Quantised:
        """Round a matrix ``(N, K)`` to int4; ``index`` is the group of each input."""
        groups = int(index.max()) + 1
        scales, zeros = torch.empty(len(weight), groups), torch.full((len(weight), groups), 8)
        for group in range(groups):
            own = weight[:, index == group]
            if self.symmetric:
                scales[:, group] = own.abs().amax(1) / 7
            else:
                low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
                scales[:, group] = (high - low) / 15
                zeros[:, group] = (-low / scales[:, group]).round().long()
        scales = scales.half()
        wide, points = scales.float()[:, index], zeros[:, index]
        numbers = (weight / wide + points).round().clamp(0, 15).long()
        return Quantised(numbers, zeros, scales, index)

    def tensors(self, stem: str, made: Quantised) -> dict[str, torch.Tensor]:
        """The tensors of a matrix."""
        if self.layout == "packed":
            found = {
                "weight_packed": in_words(made.numbers),
                "weight_scale": made.scales,
                "weight_shape": torch.tensor(made.numbers.shape),
            }
            if not self.symmetric:
                found["weight_zero_point"] = in_words(made.zeros.t()).t()
            if self.shuffled:
                found["weight_g_idx"] = made.index.int()
        elif self.layout == "awq":
            found = {
                "qweight": in_words(_awq(made.numbers.t())),
                "qzeros": in_words(_awq(made.zeros.t())),
                "scales": made.scales.t(),
            }
        else:
            zeros = in_words(made.zeros.t())
            found = {
                "qweight": in_words(made.numbers).t(),
                # The first version subtracts one from each number, word by word.
                "qzeros": zeros - 0x11111111 if self.layout == "gptq" else zeros,
                "scales": made.scales.t(),
                "g_idx": made.index.int(),
            }
        return {stem + name: tensor.contiguous() for name, tensor in found.items()}


@dataclass(frozen=True)
class Quantised:
    """Numbers ``(N, K)``, zero points and scales ``(N, G)``, and the group of each input."""

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    index: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        """The matrix that they stand for."""
        return (self.numbers - self.zeros[:, self.index]).float() * self.scales.float()[:, self.index]


def in_words(numbers: torch.Tensor) -> torch.Tensor:
    """Pack eight numbers of a row into a word, the first one in the lowest bits."""
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    words = sum(padded[:, :, place] << (4 * place) for place in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _awq(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)].flatten(1)


def quantise(
    path: Path, scheme: Scheme, *, ignored: str = "$^", matrix: str = MATRIX
) -> dict[str, torch.Tensor]:
    """Round the matrices of a checkpoint to int4, but for those whose names match ``ignored``.

    Returns:
        All tensors of a checkpoint of the same model without quantisation.
    """

    def rounding(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = weight.shape[1]
        index = torch.arange(inputs) // (inputs if scheme.group == -1 else scheme.group)
        if scheme.shuffled:
            # Projections of one input have one order; each expert's may be another.
            expert = re.search(r"experts\.(\d+)\.", name)
            seed = inputs + (int(expert[1]) if expert else 0)
            index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
        made = scheme.quantise(weight, index)
        return scheme.tensors(name.removesuffix("weight"), made), made.exact

    return rewrite(path, rounding, scheme.config, ignored=ignored, matrix=matrix)
