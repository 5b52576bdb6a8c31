"""Equal shares of a kernel's steps for its programs, for kernels in Gluon.

The steps of all tiles of results lie in one row; each of the programs, one per SM, takes an equal part of it. So no
SM waits for another's last tile, whatever their number. A share may begin and end within a tile: then the program
writes what it has of the tile, its *part*, to memory. The program that finishes the last part of a tile merges
all of them in the order of their steps: the result doesn't depend on which program comes last.

A program has at most two parts, of the tile where its share begins and of the one where it ends. Only the second
has a tile's first step, it *opens* the tile. Each of a program's two compute groups has 64 rows of a tile, and parts
of its own.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.device import num_sms
from engine.kernels.ring import block_barrier


def part_counters(device: torch.device) -> torch.Tensor:
    """Allocate zeroed counters of finished parts, int32.

    Kernels leave zeros behind, so a layer passes the same tensor to every call; calls must not overlap.
    """
    return torch.zeros(2 * num_sms(device), dtype=torch.int32, device=device)


def part_memory(width: int, device: torch.device) -> torch.Tensor:
    """Allocate memory for the parts of all programs, float32, with ``width`` numbers a row."""
    return torch.empty((2 * num_sms(device) * 128, width), dtype=torch.float32, device=device)


@gluon.jit
def share_of_program(steps):
    """Return this program's first step of ``steps``, and the end of its steps. Shares without steps are the last."""
    program = gl.program_id(0)
    each = steps // gl.num_programs(0)
    more = steps % gl.num_programs(0)
    first = program * each + gl.minimum(program, more)
    return first, first + each + (program < more).to(gl.int32)


@gluon.jit
def program_of(step, steps):
    """Return the program whose share has ``step``."""
    each = steps // gl.num_programs(0)
    more = steps % gl.num_programs(0)
    # The first ``more`` shares have a step more.
    return gl.where(
        step < more * (each + 1), step // (each + 1), more + (step - more * (each + 1)) // gl.maximum(each, 1)
    )


@gluon.jit
def part_of(program, opens, group: gl.constexpr):
    """Return the index of a program's part of a tile, which ``opens`` the tile or doesn't."""
    return (program * 2 + opens.to(gl.int32)) * 2 + group


@gluon.jit
def part_pointers(parts_ptr, part, like, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Return pointers to the columns from ``FIRST`` on, of ``WIDTH``, of a part, in the layout of ``like``."""
    layout: gl.constexpr = like.type.layout
    row = part * like.shape[0] + gl.arange(0, like.shape[0], gl.SliceLayout(1, layout))
    column = FIRST + gl.arange(0, like.shape[1], gl.SliceLayout(0, layout))
    return parts_ptr + (row * WIDTH)[:, None] + column[None, :]


@gluon.jit
def finishes_tile(counter, parts):
    """Count a part as written; return whether it was the last of ``parts``."""
    # All threads of the group must have written it.
    block_barrier()
    last = gl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def write_stats(stats_ptr, part, row_max, row_sum):
    """Write the maxima and sums of a part of a softmax."""
    row = part * row_max.shape[0] + gl.arange(0, row_max.shape[0], row_max.type.layout)
    gl.store(stats_ptr + row * 2, row_max)
    gl.store(stats_ptr + row * 2 + 1, row_sum)


@gluon.jit
def merge_stats(stats_ptr, part, row_max, row_sum):
    """Merge the maxima and sums of a part into those of earlier ones, float32, in units of log2(e).

    Returns:
        The new maxima and sums, and the factors of what was summed with the old ones and of what the part has. A
        row may have no keys in some parts, but has one in the first.
    """
    row = part * row_max.shape[0] + gl.arange(0, row_max.shape[0], row_max.type.layout)
    part_max = gl.load(stats_ptr + row * 2, cache_modifier=".cg")
    part_sum = gl.load(stats_ptr + row * 2 + 1, cache_modifier=".cg")
    new_max = gl.maximum(row_max, part_max)
    # For a row that has seen no key yet, -inf - -inf would be NaN.
    base = gl.where(new_max == float("-inf"), 0.0, new_max)
    kept = gl.exp2(row_max - base)
    added = gl.exp2(part_max - base)
    return new_max, row_sum * kept + part_sum * added, kept, added


@gluon.jit
def merge_rows(rows, kept, parts_ptr, part, added, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Return ``rows * kept + part * added``; see :func:`merge_stats`."""
    more = gl.load(part_pointers(parts_ptr, part, rows, FIRST, WIDTH), cache_modifier=".cg")
    layout: gl.constexpr = gl.SliceLayout(1, rows.type.layout)
    return rows * gl.convert_layout(kept, layout)[:, None] + more * gl.convert_layout(added, layout)[:, None]
