"""How kernels are launched, or compiled without being launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``; within :func:`compiling` the kernel is compiled only."""
    if is_compiling() and isinstance(kernel, JITFunction):
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


def is_compiling() -> bool:
    """Whether this is within :func:`compiling`."""
    return _compiling.get()


@contextmanager
def compiling() -> Iterator[None]:
    """Launches within compile their kernels, as many at a time as there are processors, and run nothing: what
    they should write holds what was in memory. In the end all are compiled. One that can't be fails where it
    is launched, not here.
    """
    token = _compiling.set(True)
    try:
        with _CompilingPool(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiling.reset(token)


class _CompilingPool(ThreadPoolExecutor):
    """Compiles kernels, and loads them on the GPU of the thread that made it."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads, "compile")
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(self._load, compile_kernel)

    def _load(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        if self._device is not None:
            # What launches it is compiled as well, by a C compiler in some versions of Triton. Left to the
            # first launch, all of them would be made one after the other.
            with torch.cuda.device(self._device):
                kernel.run  # noqa: B018
        return kernel
