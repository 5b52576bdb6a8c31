"""fp8 GEMMs by cuBLASLt itself, without a workspace.

PyTorch gives cuBLASLt a workspace. Where tiles of a GEMM take several rounds, cuBLASLt then chooses kernels whose
programs fetch their next tile from a counter in that workspace, and a memset clears the counter before each launch.
The device waits for it: 5 µs on an H200, as long as a third of a GEMM of an image's 1600 patches. Without a workspace
the tiles are shared out beforehand. PyTorch sets the workspace for the whole process, which an engine within another
program must leave alone; so the library is called directly here. It is the one that PyTorch has loaded.

Source of names and values: cublasLt.h of CUDA 12.9 and 13.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from typing import Any

import torch

#: ``cublasOperation_t``, ``cublasComputeType_t``, ``cudaDataType_t``.
_TRANSPOSED = 1
_COMPUTE_FLOAT32 = 68
_FLOAT32, _BFLOAT16, _FP8 = 0, 14, 28
#: ``cublasLtMatmulDescAttributes_t``.
_TRANSPOSE_A, _EPILOGUE, _BIAS = 3, 7, 8
_SCALE_A, _SCALE_B, _FAST_SUMS, _BIAS_TYPE, _MODE_A, _MODE_B = 17, 18, 25, 26, 31, 32
#: ``cublasLtEpilogue_t``, ``cublasLtMatmulMatrixScale_t``.
_ADD_BIAS, _SCALE_EACH_ROW = 4, 3
#: The library knows scales of rows from this version on.
_FIRST_VERSION = 120900
#: Plans that are kept: numbers of rows of prompts that are not captured are many.
_PLANS = 4096
#: Bytes.
_ALIGNMENT = 256
_uint64 = ctypes.c_uint64


class _Algorithm(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Failed(RuntimeError):
    """A call of the library returned an error."""


@functools.cache
def _library() -> ctypes.PyDLL | None:
    """Return the library that PyTorch has loaded; None where there is none that knows scales of rows.

    Its calls keep the interpreter: none waits for the device, and a GEMM makes several, at each of which another
    thread could take the interpreter for milliseconds.
    """
    cuda = torch.version.cuda
    if cuda is None or not torch.cuda.is_available():
        return None
    torch.cuda.init()
    try:
        # PyTorch's handles belong to its own copy of the library; another one must not be opened.
        library = ctypes.PyDLL(f"libcublasLt.so.{cuda.split('.')[0]}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return library if library.cublasLtGetVersion() >= _FIRST_VERSION else None


def _check(status: int) -> None:
    if status:
        raise _Failed(f"cuBLASLt returned status {status}")


class _Plan:
    """How to compute ``(rows, inputs) @ (outputs, inputs).T``.

    To the library a matrix in rows is its transpose in columns, so it computes the transposed result: the weight is
    its first operand.
    """

    def __init__(
        self, library: ctypes.PyDLL, rows: int, outputs: int, inputs: int, *, bias: bool, fast: bool
    ) -> None:
        self._library = library
        # The operation's descriptor holds the addresses of a call.
        self._lock = threading.Lock()
        self._operation = self._make("MatmulDesc", _COMPUTE_FLOAT32, _FLOAT32)
        self._set(_TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self._set(_FAST_SUMS, ctypes.c_int8(fast))
        for mode in (_MODE_A, _MODE_B):
            self._set(mode, ctypes.c_int32(_SCALE_EACH_ROW))
        if bias:
            self._set(_EPILOGUE, ctypes.c_int32(_ADD_BIAS))
            self._set(_BIAS_TYPE, ctypes.c_int32(_BFLOAT16))
        self._weight = self._layout(_FP8, inputs, outputs)
        self._rows = self._layout(_FP8, inputs, rows)
        self._out = self._layout(_BFLOAT16, outputs, rows)
        self._algorithm = _Algorithm()

    def _make(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        _check(getattr(self._library, f"cublasLt{kind}Create")(ctypes.byref(made), *arguments))
        # At the end of the process the library may be gone first.
        weakref.finalize(self, getattr(self._library, f"cublasLt{kind}Destroy"), made).atexit = False
        return made

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        return self._make("MatrixLayout", dtype, _uint64(rows), _uint64(columns), ctypes.c_int64(rows))

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _check(
            self._library.cublasLtMatmulDescSetAttribute(
                self._operation, attribute, ctypes.byref(value), size
            )
        )

    def _point(self, weight_scale: int, row_scale: int, bias: int | None) -> None:
        self._set(_SCALE_A, ctypes.c_void_p(weight_scale))
        self._set(_SCALE_B, ctypes.c_void_p(row_scale))
        if bias is not None:
            self._set(_BIAS, ctypes.c_void_p(bias))

    def choose(self, handle: ctypes.c_void_p, *, bias: bool) -> bool:
        """Choose the algorithm; return whether there is one."""
        # The library wants addresses, and reads nothing there.
        self._point(_ALIGNMENT, _ALIGNMENT, _ALIGNMENT if bias else None)
        # By default a preference allows no workspace.
        preference, found = self._make("MatmulPreference"), ctypes.c_int()
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            handle, self._operation, self._weight, self._rows, self._out, self._out, preference, 1,
            ctypes.byref(self._algorithm), ctypes.byref(found),
        )  # fmt: skip
        return status == 0 and found.value == 1

    def run(
        self,
        handle: ctypes.c_void_p,
        stream: int,
        operands: tuple[int, int, int],
        scales: tuple[int, int],
        bias: int | None,
    ) -> None:
        """Compute on ``stream``.

        Args:
            operands: addresses of the weight, the rows and the result.
            scales: of the weight and the rows.
        """
        one, nothing = ctypes.c_float(1.0), ctypes.c_float(0.0)
        weight, rows, out = map(ctypes.c_void_p, operands)
        with self._lock:
            self._point(*scales, bias)
            status = self._library.cublasLtMatmul(
                handle, self._operation, ctypes.byref(one), weight, self._weight, rows, self._rows,
                ctypes.byref(nothing), out, self._out, out, self._out, ctypes.byref(self._algorithm),
                None, _uint64(0), ctypes.c_void_p(stream),
            )  # fmt: skip
        _check(status)


@functools.lru_cache(maxsize=_PLANS)
def _plan(device: int, rows: int, outputs: int, inputs: int, *, bias: bool, fast: bool) -> _Plan | None:
    """Return the plan of a GEMM on a device; None if the library has none without a workspace."""
    library = _library()
    if library is None:
        return None
    try:
        plan = _Plan(library, rows, outputs, inputs, bias=bias, fast=fast)
        with torch.cuda.device(device):
            return plan if plan.choose(_handle(), bias=bias) else None
    except _Failed:
        return None


def _handle() -> ctypes.c_void_p:
    """Return PyTorch's handle for the current device: one of cuBLAS is one of cuBLASLt."""
    return ctypes.c_void_p(torch.cuda.current_blas_handle())


def gemm_without_workspace(
    numbers: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    fast: bool,
) -> torch.Tensor | None:
    """Compute ``(numbers @ weight.T) * row_scale * scale.T + bias`` in bfloat16 on the GPU of ``numbers``.

    Args:
        numbers: ``(T, K)`` fp8, contiguous.
        weight: ``(N, K)`` fp8, contiguous.
        row_scale: ``(T, 1)`` float32, contiguous.
        scale: ``(N, 1)`` float32, contiguous.
        bias: ``(N,)`` bfloat16, contiguous.
        fast: see ``use_fast_accum`` of :func:`torch._scaled_mm`.

    Returns:
        ``(T, N)``; None if the library can't, or refuses the call.
    """
    (rows, inputs), outputs = numbers.shape, len(weight)
    operands = numbers, weight, row_scale, scale
    # The library gets addresses alone, so it can't check this.
    assert numbers.dtype == weight.dtype == torch.float8_e4m3fn and weight.shape[1:] == (inputs,)
    assert row_scale.dtype == scale.dtype == torch.float32
    assert row_scale.shape == (rows, 1) and scale.shape == (outputs, 1)
    if bias is not None:
        assert bias.dtype == torch.bfloat16 and bias.shape == (outputs,)
        operands += (bias,)
    assert all(each.is_contiguous() and each.device == numbers.device for each in operands)
    plan = None
    # The library takes operands to be aligned like this.
    if rows and not any(each.data_ptr() % _ALIGNMENT for each in operands):
        plan = _plan(numbers.device.index, rows, outputs, inputs, bias=bias is not None, fast=fast)
    if plan is None:
        return None
    out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=numbers.device)
    try:
        with torch.cuda.device(numbers.device):
            plan.run(
                _handle(),
                torch.cuda.current_stream().cuda_stream,
                (weight.data_ptr(), numbers.data_ptr(), out.data_ptr()),
                (scale.data_ptr(), row_scale.data_ptr()),
                None if bias is None else bias.data_ptr(),
            )
    except _Failed:
        # If the device is to blame, torch's call raises.
        return None
    return out
