"""Kernels that are launched before the one ahead of them has ended (programmatic dependent launch).

The decode step of a few sequences is a few hundred kernels of some microseconds each, and between two of them the
device would do nothing for about one more. A kernel that says so at its launch may start while its predecessor's
last programs run. It must wait before it writes anything, and before it reads what the kernel ahead makes, in
every program, whatever it does after: the next kernel takes its end as a sign that its own predecessors have
ended too. So what the kernels before the one ahead have made may be read at once, as weights may.

The next kernel may start when every program has waited, or earlier where this one says so. It may find the kernel
before this one at work then, and what that one makes may not be read at once either. No two kernels in a row let
the next one start earlier.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.tiling import FEW_ROWS, nvidia_capability


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """The next kernel may start when every program has said this, not only when it has waited."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the kernel ahead has ended and what it wrote is there; then the next one may start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch options of a kernel over the rows of ``x`` that calls :func:`wait_for_previous` with its argument
    ``OVERLAP``.

    Only the kernels of a few rows overlap, which are nearly all ours: one that stands between two of torch's
    gains nothing, and its programs that wait take the place of those that work.
    """
    return _OVERLAPPING if x.shape[0] <= FEW_ROWS and _can_overlap(x.device) else _ALONE


_OVERLAPPING: dict[str, Any] = {"OVERLAP": True, "launch_pdl": True}
_ALONE: dict[str, Any] = {"OVERLAP": False}


def _can_overlap(device: torch.device) -> bool:
    """Whether ``device`` knows such launches: NVIDIA's do since Hopper."""
    return nvidia_capability(device) >= (9, 0)
