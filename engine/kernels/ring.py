"""Rings of buffers in shared memory for kernels in Gluon, with the barriers that say which are ready or free."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Newer versions of Triton renamed these functions.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
#: Waits for all threads of the warps that run the caller.
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def buffers(COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, dtype: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, DIM], layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate ``COUNT`` barriers that each open after ``ARRIVALS`` arrivals."""
    allocated = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(allocated.index(index), count=ARRIVALS)
    return allocated


@gluon.jit
def clear_tail(tile, valid_rows):
    """Zero a tile of values from row ``valid_rows`` on: a weight of zero times a NaN would be NaN.

    Run by compute groups of four warps, each before its own product; they write the same.
    """
    DIM: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    loaded = tile.load(layout)
    tile.store(gl.where((row < valid_rows)[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
