"""Starts processes of tests as forks of one that has imported torch: a new one takes two seconds for that."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import torch

#: Modules with the work of such processes.
_MODULES = ["tests.engine.distributed.ranks", "tests.engine.kernels.peer_ranks"]


def start_method() -> str:
    """``forkserver``; with a GPU ``spawn``: kernels are decorated for it or for the interpreter, as the
    environment says when they are imported, and forks have the environment in which their server started."""
    if torch.cuda.is_available():
        return "spawn"
    # A module that can't be imported there is imported by each fork.
    multiprocessing.set_forkserver_preload(_MODULES)
    return "forkserver"


def context() -> BaseContext:
    """Makes processes and connections to them."""
    return multiprocessing.get_context(start_method())
