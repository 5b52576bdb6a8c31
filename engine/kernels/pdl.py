"""Programmatic dependent launch (PDL): a kernel may start before the previous kernel has finished.

A decode step of a few sequences runs a few hundred kernels of some microseconds each. Between two of them the
device would be idle for about one microsecond. A kernel that is launched with PDL may start while the last
programs of the previous kernel still run. Two rules keep this correct:

* Every program calls :func:`wait_for_previous` before it writes anything and before it reads what the
  previous kernel writes. It does so even if it then returns at once: the next kernel takes the end of this
  kernel as a sign that the previous kernel has finished too.
* Before that call a program may read weights, and what was there before this pass through the layers: its
  inputs, and keys, values and states of earlier tokens. What other kernels of the pass write it reads after the
  call: several kernels before it may still be running.

By default the next kernel may start once every program has waited. A kernel that calls
:func:`launch_dependents` lets it start earlier, while this kernel itself still waits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.device import MEMORY_BOUND_ROWS, compute_capability


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel start once every program has called this, before they wait."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def launch_dependents_of_one_row(PDL: tl.constexpr):
    """Call :func:`launch_dependents` in a kernel of a program per row, if there is one row: the next kernel, mostly a
    linear layer, loads its first weights while this one waits for the row. With more rows its programs that wait
    would take registers and shared memory from those that work."""
    if tl.num_programs(0) == 1:
        launch_dependents(PDL)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel has finished and its writes are visible; then let the next kernel
    start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def pdl_options(x: torch.Tensor) -> dict[str, Any]:
    """Return the launch options of a kernel over the rows of ``x`` that passes ``PDL`` to
    :func:`wait_for_previous`.

    It is on for few rows only, where nearly all kernels are ours. A kernel between two of torch's kernels gains
    nothing, and its waiting programs take SM resources from the running ones. Attention of images, whose programs
    are few, turns PDL on by itself.
    """
    return _PDL if x.shape[0] <= MEMORY_BOUND_ROWS and _supports_pdl(x.device) else _NO_PDL


_PDL: dict[str, Any] = {"PDL": True, "launch_pdl": True}
_NO_PDL: dict[str, Any] = {"PDL": False}


def _supports_pdl(device: torch.device) -> bool:
    """Return whether ``device`` supports PDL: NVIDIA GPUs do since Hopper."""
    return compute_capability(device) >= (9, 0)
