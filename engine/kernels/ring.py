"""Rings of buffers in shared memory for kernels in Gluon, with the barriers that say which are ready or free."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.fp8 import FP8

# Newer versions of Triton renamed these functions.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
#: Waits for all threads of the warps that run the caller.
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

#: Bytes of a row of a matrix in a step of a GEMM.
STEP_BYTES = 128
#: Types of matrices that :func:`describe` knows.
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, FP8: gl.float8e4nv}


def describe(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """Describe tiles of ``rows`` rows of a matrix, or of all matrices of a stack, and ``STEP_BYTES`` of each."""
    box = [rows, STEP_BYTES // matrix.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(box, DTYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), box, layout)


#: Descriptors by weight, then by rows of a tile.
_DESCRIPTORS = WeakTensorKeyDictionary()


def described(weight: torch.Tensor, rows: int) -> TensorDescriptor:
    """:func:`describe` a weight once, for as long as it lives: it is most of the host time of a launch."""
    found = _DESCRIPTORS.setdefault(weight, {})
    if rows not in found:
        found[rows] = describe(weight, rows)
    return found[rows]


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
