"""The process of one rank beyond 0: loads its share of the model and computes the steps of rank 0."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import threading
from collections import deque
from multiprocessing.connection import Connection

import numpy as np
import torch

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import TorchGroup
from engine.errors import SightlineError, Unavailable
from engine.executor.rank import ModelRank, rank_device
from engine.executor.wire import BatchReceiver, MakeRunner, MeasureBlocks, Setup
from engine.families.registry import resolve
from engine.runner.launched_step import LaunchedStep
from engine.runner.model_runner import ModelRunner
from engine.startup import StartTimes

logger = logging.getLogger(__name__)

#: Seconds from the end of a rank's work until it ends, unless its parent has ended it by then.
_GRACE_S = 5.0


def serve(connection: Connection, own_process: bool = True) -> None:
    """Serve rank 0 until its end of ``connection`` closes. Report an exception to rank 0 and return.

    Args:
        own_process: what is loaded is kept from the process's garbage collector.
    """
    try:
        runner = _start(connection)
        if own_process:
            gc.collect()
            gc.freeze()
        connection.send(None)
        _run_steps(connection, runner)
    except (EOFError, ConnectionError):
        return
    except BaseException as error:
        report = error if isinstance(error, SightlineError) else Unavailable(f"A rank failed: {error!r}")
        try:
            connection.send(report)
        except OSError:
            return
        if report is not error:
            logger.exception("a rank of the language model failed")


def _start(connection: Connection) -> ModelRunner:
    setup: Setup = connection.recv()
    config = setup.config
    device = rank_device(config, setup.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    connection.send(None)
    group = TorchGroup.join(
        rank=setup.rank, size=config.tensor_parallel_size, address=setup.address, device=device
    )
    checkpoint = Checkpoint.open(config.model, config.revision)
    rank = ModelRank.load(config, checkpoint, resolve(checkpoint).parse(checkpoint), group, StartTimes())
    connection.send(None)
    message = connection.recv()
    if isinstance(message, MeasureBlocks):
        connection.send(rank.measure_blocks())
        message = connection.recv()
    assert isinstance(message, MakeRunner)
    return rank.make_runner(message.num_blocks, message.max_model_len, message.num_slots)


def _run_steps(connection: Connection, runner: ModelRunner) -> None:
    receiver = BatchReceiver()

    def grammar_mask(slots: list[int], mask: np.ndarray) -> list[list[int] | None]:
        mask[...], settled = connection.recv()
        return settled

    launched: deque[LaunchedStep] = deque()
    while True:
        message = connection.recv()
        # Tokens stay on the device for the next step. All ranks sample the same; rank 0 alone needs them.
        launched.append(runner.execute(receiver.batch(message), grammar_mask if message.masked else None))
        while launched and launched[0].ready():
            # It gives the step's memory back.
            launched.popleft().result()


def _end_with_parent(folder: str) -> None:
    """Exit the process at once when standard input closes. A parent that was killed has left ``folder``."""
    sys.stdin.buffer.read()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    _descriptor, _folder = sys.argv[1:]
    _parent = threading.Thread(target=_end_with_parent, args=(_folder,), daemon=True)
    _parent.start()
    with Connection(int(_descriptor)) as _connection:
        serve(_connection)
    # If that was the end of this process's parent, its folder goes first.
    _parent.join(_GRACE_S if _folder else 0)
    # Skip finalizers: they might wait for ranks that have ended.
    os._exit(0)
