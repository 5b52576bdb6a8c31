"""Rewrites a tiny checkpoint with quantised matrices, which other modules round."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engine.tiny import rewrite_json, rewrite_tensors

#: The matrices of a decoder's attention and MLP.
MATRIX = r".*layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight"

#: Rounds the matrix of a name: the tensors that stand for it, by name, and the matrix that they mean.
Rounding = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def rewrite(
    path: Path,
    rounding: Rounding,
    config: Callable[[list[str]], dict[str, Any]],
    *,
    ignored: str = "$^",
    matrix: str = MATRIX,
) -> dict[str, torch.Tensor]:
    """Round the matrices of a checkpoint, but for those whose names match ``ignored``.

    Args:
        rounding: rounds one of them.
        config: makes the ``quantization_config`` with the names of the modules that are left alone.
        matrix: the names of the matrices.

    Returns:
        All tensors of a checkpoint of the same model without quantisation.
    """
    exact: dict[str, torch.Tensor] = {}
    skipped = ["lm_head"]

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not re.fullmatch(matrix, name) or re.search(ignored, name):
                made[name] = exact[name] = tensor
                if re.fullmatch(matrix, name):
                    skipped.append(name.removesuffix(".weight"))
                continue
            found, exact[name] = rounding(name, tensor)
            made |= found
        return made

    rewrite_tensors(path, change)
    rewrite_json(path / "config.json", {"quantization_config": config(skipped)})
    return exact
