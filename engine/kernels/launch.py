"""How kernels are launched, or compiled without being launched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``; within :func:`compiling` the kernel is compiled only."""
    if _compiling.get() and isinstance(kernel, JITFunction):
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Launches within compile their kernels, as many at a time as there are processors, and run nothing: what
    they should write holds what was in memory. In the end all are compiled. One that can't be fails where it
    is launched, not here.
    """
    token = _compiling.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiling.reset(token)
