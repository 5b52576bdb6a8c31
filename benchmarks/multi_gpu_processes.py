"""Processes of the benchmark on several GPUs, and the rows that its parts report."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

#: How the lines of a part's output begin that hold a row of the table.
ROW = "ROW "
# A server that has imported torch, but not used a GPU, forks: a process is up at once.
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a part is told.

    Attributes:
        gpus: how many to use; without any, the number of ranks on the CPU.
        on_gpu: there are GPUs.
        seconds: the part should take no longer.
        shapes: those that the layouts serve; None for the part's own choice.
        images: of a request to the layouts, one number or several; None for the part's own choice.
        layouts: the names of those to measure; None for all.
        batched_tokens: most in one step of a language model of the layouts.
        of: of how many GPUs ``gpus`` are a part, see :mod:`benchmarks.multi_gpu_layouts`; None for no others.
    """

    gpus: int
    on_gpu: bool
    seconds: float
    shapes: list[str] | None = None
    images: list[int] | None = None
    layouts: list[str] | None = None
    batched_tokens: int = 8192
    of: int | None = None


def emit(case: str, **figures: Any) -> None:
    """Report a row: it counts even if the part fails later."""
    print(ROW + json.dumps({"case": case, **figures}), flush=True)


def start(work: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Start ``work(connection, *args)`` in a new process; returns it and the other end of the connection."""
    _context.set_forkserver_preload(["benchmarks.multi_gpu"])
    ours, theirs = _context.Pipe()
    process = _context.Process(target=work, args=(theirs, *args))
    process.start()
    theirs.close()
    return process, ours


def answer_of(process: BaseProcess, connection: Connection) -> Any:
    """The next message of a process that was started with :func:`start`.

    Raises:
        RuntimeError: it sent an exception, or ended without a message.
    """
    try:
        message = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process ended with status {process.exitcode}") from None
    if isinstance(message, BaseException):
        raise RuntimeError(str(message))
    return message


class reporting:
    """Sends an exception of its block, with its traceback, over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self._connection.send(RuntimeError("".join(traceback.format_exception(error)[-6:])))
        return isinstance(error, Exception)
