"""The process of one rank beyond 0: it loads its share, and computes each step that rank 0 announces."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from multiprocessing.connection import Connection

import numpy as np
import torch

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import TorchGroup
from engine.errors import SightlineError, Unavailable
from engine.executor.rank import ModelRank, rank_device
from engine.executor.wire import BatchReceiver, MakeRunner, MeasureBlocks, Setup
from engine.families.registry import resolve
from engine.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def serve(line: Connection) -> None:
    """Do what rank 0 says until its end of ``line`` closes. What is raised on the way is told to it."""
    try:
        runner = _start(line)
        _run_steps(line, runner)
    except (EOFError, ConnectionError):
        return
    except BaseException as error:
        told = error if isinstance(error, SightlineError) else Unavailable(f"A rank failed: {error!r}")
        try:
            line.send(told)
        except OSError:
            return
        if told is not error:
            logger.exception("a rank of the language model failed")


def _start(line: Connection) -> ModelRunner:
    setup: Setup = line.recv()
    config = setup.config
    device = rank_device(config, setup.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    line.send(None)
    group = TorchGroup.join(
        rank=setup.rank, size=config.tensor_parallel_size, address=setup.address, device=device
    )
    checkpoint = Checkpoint.open(config.model, config.revision)
    rank = ModelRank.load(config, checkpoint, resolve(checkpoint).parse(checkpoint), group)
    line.send(None)
    message = line.recv()
    if isinstance(message, MeasureBlocks):
        line.send(rank.measure_blocks())
        message = line.recv()
    assert isinstance(message, MakeRunner)
    runner = rank.make_runner(message.num_blocks, message.max_model_len, message.num_slots)
    gc.collect()
    gc.freeze()
    line.send(None)
    return runner


def _run_steps(line: Connection, runner: ModelRunner) -> None:
    receiver = BatchReceiver()

    def grammar_mask(slots: list[int]) -> np.ndarray:
        return line.recv()

    while True:
        message = line.recv()
        # Tokens stay on the device for the next step; rank 0 reads its own, which are the same.
        runner.execute(receiver.batch(message), grammar_mask if message.masked else None)


def _end_with_parent() -> None:
    """Leave the process, whatever it is doing, when standard input closes."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(Connection(int(sys.argv[1])))
    # Other ranks may be gone: nothing that waits for them may run.
    os._exit(0)
