"""Which implementation of a kernel runs: Triton's on a GPU, the torch reference on a CPU."""

from __future__ import annotations

import os

import torch

_CHOICE = os.environ.get("SIGHTLINE_KERNELS", "auto")
if _CHOICE not in ("auto", "reference", "triton"):
    raise ValueError(f"SIGHTLINE_KERNELS must be auto, reference or triton, not {_CHOICE!r}")


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether to run the Triton kernel on ``tensor``'s device.

    The environment variable ``SIGHTLINE_KERNELS`` overrides the choice for comparisons: ``reference`` runs
    torch on a GPU too.
    """
    if _CHOICE == "auto":
        return tensor.is_cuda
    return _CHOICE == "triton"
