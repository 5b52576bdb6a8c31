"""All ranks of one language model, as rank 0's process sees them: one runner like any other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.core import GrammarMask, Runner
from engine.distributed.group import SingleProcessGroup, TorchGroup
from engine.errors import Unavailable
from engine.executor.channel import Workers
from engine.executor.launch import Launcher
from engine.executor.rank import ModelRank, check_gpus, rank_device
from engine.executor.wire import BatchSender, MakeRunner, MeasureBlocks, Setup
from engine.families.base import ModelConfig
from engine.fit import check_fit
from engine.runner.model_runner import LaunchedStep, ModelRunner
from engine.scheduling.batch import ScheduledBatch, StepResult

_POLL_S = 2e-5
#: A death is noticed on two ways; the one that says whose it was may be the later one.
_NOTICE_S = 5.0


class Executor(Protocol):
    """A model whose weights are loaded, on however many ranks."""

    max_model_len: int

    def measure_blocks(self) -> int:
        """KV blocks that every rank has room for; see :meth:`ModelRank.measure_blocks`."""

    def make_runner(self, num_blocks: int, max_model_len: int, num_slots: int) -> Runner:
        """What computes steps, ready for requests."""


def load_ranks(
    config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, launcher: Launcher
) -> Executor:
    """Load the language model on ``config.tensor_parallel_size`` ranks, of which 0 is this process.

    Args:
        launcher: starts the others; not used for a single rank.

    Raises:
        CheckpointError: the checkpoint is unusable; see :mod:`engine.families.load`.
        ConfigError: a field of ``config`` does not fit the model or the machine.
        Unavailable: a rank has died.
    """
    check_fit(config, model)
    check_gpus(config)
    size = config.tensor_parallel_size
    if size == 1:
        return ModelRank.load(config, checkpoint, model, SingleProcessGroup())
    return ParallelExecutor(config, checkpoint, model, launcher)


@dataclass(slots=True)
class _GroupParts:
    """What does not just go with the last reference to it."""

    workers: Workers
    launcher: Launcher
    group: TorchGroup | None = None
    runner: ModelRunner | None = None

    def end(self) -> None:
        self.workers.stop()
        if self.group is not None:
            # First a step that waits for the other ranks ends, then its captured graphs go, then the group.
            self.group.abort()
            if self.runner is not None:
                self.runner.close()
            self.group.close()
        # The group looks there once a second, and would wait for what is gone.
        self.launcher.clear()


class ParallelExecutor:
    """This process's rank 0 and the lines to the others.

    The others end when this is closed, when it and its runner are collected, or with the interpreter.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, launcher: Launcher
    ) -> None:
        size = config.tensor_parallel_size
        # At the interpreter's end what was made first goes last, and this must outlast the group.
        address = launcher.address
        self.workers = Workers(launcher, size)
        self._parts = _GroupParts(self.workers, launcher)
        self._close = weakref.finalize(self, self._parts.end)
        try:
            self.workers.send_each([Setup(config, rank, address) for rank in range(1, size)])
            # From here on they only wait for each other, and for this one.
            self.workers.receive()
            device = rank_device(config, 0)
            group = TorchGroup.join(rank=0, size=size, address=address, device=device)
            self._parts.group = group
            self.workers.when_lost(group.abort)
            self._own = ModelRank.load(config, checkpoint, model, group)
            self.workers.receive()
        except BaseException:
            self.close()
            raise
        self.max_model_len = self._own.max_model_len

    def measure_blocks(self) -> int:
        self.workers.send(MeasureBlocks())
        own = self._own.measure_blocks()
        return min(own, *self.workers.receive())

    def make_runner(self, num_blocks: int, max_model_len: int, num_slots: int) -> ParallelRunner:
        self.workers.send(MakeRunner(num_blocks, max_model_len, num_slots))
        runner = self._parts.runner = self._own.make_runner(num_blocks, max_model_len, num_slots)
        self.workers.receive()
        return ParallelRunner(runner, self)

    def close(self) -> None:
        """End the other ranks, and return when they are gone; may be called repeatedly."""
        self._close()


class LaunchedParallelStep:
    """A step on its way, on all ranks."""

    def __init__(self, own: LaunchedStep, workers: Workers) -> None:
        self._own, self._workers = own, workers

    def result(self) -> StepResult:
        """Wait for it.

        Raises:
            Unavailable: a rank has died.
        """
        # A GPU whose peer is gone waits forever.
        while not self._own.ready():
            self._workers.check()
            time.sleep(_POLL_S)
        result = self._own.result()
        # Steps that were cut short end too.
        self._workers.check()
        return result


class ParallelRunner:
    """Announces each step to the other ranks and computes it with them.

    Every rank samples: logits are gathered on all of them, so they are the same bits, and a token depends on
    nothing else but what the step's message says. Grammar masks follow in a message of their own, made while
    the ranks already compute.
    """

    def __init__(self, own: ModelRunner, executor: ParallelExecutor) -> None:
        self._own = own
        self._executor = executor
        self._workers = executor.workers
        self._sender = BatchSender()
        self.vocab_size = own.vocab_size

    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> LaunchedParallelStep:
        """See :meth:`ModelRunner.execute`.

        Raises:
            RequestFault: the work for one request raised, before the other ranks heard of the step.
            Unavailable: a rank has died, and with it the others.
        """

        def shared_mask(slots: list[int]) -> np.ndarray:
            assert grammar_mask is not None
            mask = grammar_mask(slots)
            self._workers.send(mask)
            return mask

        self._workers.check()
        prepared = self._own.prepare(batch)
        try:
            self._workers.send(self._sender.message(batch, grammar_mask is not None))
            step = self._own.compute(prepared, None if grammar_mask is None else shared_mask)
        except BaseException as error:
            if isinstance(error, Exception) and self._workers.wait_for_loss(_NOTICE_S):
                self._workers.check()
            # Whatever it was, the ranks are no longer in step.
            self._workers.give_up(Unavailable(f"Rank 0 of the language model failed: {error!r}"))
            raise
        return LaunchedParallelStep(step, self._workers)

    def recover(self) -> None:
        """
        Raises:
            Unavailable: a rank has died, or they are no longer in step.
        """
        self._workers.check()
        self._own.recover()

    def check_idle(self, released: Collection[int]) -> None:
        self._own.check_idle(released)

    def check_health(self) -> None:
        """
        Raises:
            Unavailable: a rank has died.
        """
        self._workers.check()

    def close(self) -> None:
        self._executor.close()
