"""Launches kernels, or compiles them without launching."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime import build
from triton.runtime.jit import JITFunction

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch ``kernel`` on ``grid``; within :func:`compiling` only compile it.

    Args:
        arguments: the kernel's parameters and launch options, by name.
    """
    # The same as kernel[grid](...), which would copy the arguments twice more.
    kernel.run(grid=grid, warmup=is_compiling() and isinstance(kernel, JITFunction), **arguments)


def is_compiling() -> bool:
    """Return whether the caller runs within :func:`compiling`."""
    return _compiling.get()


@contextmanager
def compiling() -> Iterator[None]:
    """Compile the kernels that are launched within, on all CPU cores in parallel, and run none of them.

    Output tensors keep whatever was in memory. On exit all kernels are compiled. A kernel that fails to
    compile raises where it is launched later, not here.
    """
    token = _compiling.set(True)
    try:
        with _CompilingPool(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiling.reset(token)


class _CompilingPool(ThreadPoolExecutor):
    """Thread pool that compiles kernels and loads them on the GPU of the thread that created the pool."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads, "compile")
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(self._load, compile_kernel)

    def _load(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        if self._device is not None:
            # Some versions of Triton compile a launcher per kernel with a C compiler. At the first launches
            # the launchers would be compiled one after the other; here they are compiled in parallel.
            with torch.cuda.device(self._device):
                kernel.run  # noqa: B018
        return kernel


def _load_by_itself(name: str, path: str) -> ModuleType:
    """Load an extension that Triton has compiled as a module of its own.

    Some versions of Triton name all launchers alike. Python has one module for them, and loading a file again puts
    that file's functions into it. Then a thread that has just loaded another launcher would take this one, which
    passes a kernel the arguments of another. A name for each path keeps them apart: Python looks for the
    initialisation function by what follows the last dot.
    """
    spec = importlib.util.spec_from_file_location(
        f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.{name}", path
    )
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no extension that Python can load")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build._load_module_from_path = _load_by_itself
