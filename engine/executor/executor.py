"""Loads a language model on all its ranks, and makes one runner of them for rank 0's process."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

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
from engine.runner.launched_step import LaunchedStep
from engine.runner.model_runner import ModelRunner
from engine.scheduling.batch import ScheduledBatch, StepResult
from engine.startup import StartTimes

_POLL_S = 2e-5
#: Seconds to wait for the notice that names a dead rank: the failed operation may be noticed before it.
_NOTICE_S = 5.0


class Executor(Protocol):
    """A model whose weights are loaded, on one rank or several."""

    max_model_len: int

    def measure_blocks(self) -> int:
        """Return the number of KV blocks that fit on every rank; see :meth:`ModelRank.measure_blocks`."""

    def check_blocks(self, num_blocks: int) -> None:
        """Check that a rank can hold so many KV blocks; see :meth:`ModelRank.check_blocks`."""

    def make_runner(self, num_blocks: int, max_model_len: int, num_slots: int) -> Runner:
        """Make the runner, ready for requests."""


def load_ranks(
    config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, launcher: Launcher, times: StartTimes
) -> Executor:
    """Load the language model on ``config.tensor_parallel_size`` ranks, of which 0 is this process.

    Args:
        launcher: starts the other ranks; not used for a single rank.
        times: gets the phases of rank 0, also those of later calls.

    Raises:
        CheckpointError: the checkpoint is unusable; see :mod:`engine.families.load`.
        ConfigError: a field of ``config`` does not fit the model or the machine.
        Unavailable: a rank has died.
    """
    check_fit(config, model)
    size = config.tensor_parallel_size
    check_gpus(config, launcher.ranks_here(size))
    if size == 1:
        return ModelRank.load(config, checkpoint, model, SingleProcessGroup(), times)
    return ParallelExecutor(config, checkpoint, model, launcher, times)


@dataclass(slots=True)
class _GroupParts:
    """Parts of a group that must be ended in order; dropping their references isn't enough."""

    workers: Workers
    launcher: Launcher
    group: TorchGroup | None = None
    runner: ModelRunner | None = None

    def end(self) -> None:
        self.workers.stop()
        if self.group is not None:
            # In this order: end a step that waits for other ranks, free captured graphs, free the group.
            self.group.abort()
            if self.runner is not None:
                self.runner.close()
            self.group.close()
        # Last: the group polls the rendezvous file once a second, and would wait for a missing one.
        self.launcher.clear()


class ParallelExecutor:
    """Rank 0 in this process, and the connections to the other ranks.

    The other ranks end when this is closed, when it and its runner are collected, or with the interpreter.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        model: ModelConfig,
        launcher: Launcher,
        times: StartTimes,
    ) -> None:
        size = config.tensor_parallel_size
        # Finalizers run in reverse order at exit, and the address must outlive the group.
        address = launcher.address
        self.workers = Workers(launcher, size)
        self._parts = _GroupParts(self.workers, launcher)
        self._close = weakref.finalize(self, self._parts.end)
        try:
            with times.phase("other ranks"):
                self.workers.send_each([Setup(config, rank, address) for rank in range(1, size)])
                # All processes are up. From here on the ranks wait only for each other.
                self.workers.receive()
                device = rank_device(config, 0)
                group = TorchGroup.join(rank=0, size=size, address=address, device=device)
            self._parts.group = group
            self.workers.when_lost(group.abort)
            self._own = ModelRank.load(config, checkpoint, model, group, times)
            self.workers.receive()
        except BaseException:
            self.close()
            raise
        self.max_model_len = self._own.max_model_len

    def measure_blocks(self) -> int:
        self.workers.send(MeasureBlocks())
        own = self._own.measure_blocks()
        return min(own, *self.workers.receive())

    def check_blocks(self, num_blocks: int) -> None:
        # All ranks have the same share.
        self._own.check_blocks(num_blocks)

    def make_runner(self, num_blocks: int, max_model_len: int, num_slots: int) -> ParallelRunner:
        self.workers.send(MakeRunner(num_blocks, max_model_len, num_slots))
        runner = self._parts.runner = self._own.make_runner(num_blocks, max_model_len, num_slots)
        self.workers.receive()
        return ParallelRunner(runner, self)

    def close(self) -> None:
        """End the other ranks, and return when their processes have ended; may be called repeatedly."""
        self._close()


class LaunchedParallelStep:
    """A step that all ranks compute."""

    def __init__(self, own: LaunchedStep, workers: Workers) -> None:
        self._own, self._workers = own, workers

    def result(self) -> StepResult:
        """Wait for the step's result.

        Raises:
            Unavailable: a rank has died.
        """
        # A GPU operation whose peer has died never completes.
        while not self._own.ready():
            self._workers.check()
            time.sleep(_POLL_S)
        result = self._own.result()
        # An aborted step completes too, with wrong values.
        self._workers.check()
        return result


class ParallelRunner:
    """Sends each step to the other ranks and computes it with them.

    Every rank samples. All ranks gather the same logits, bit for bit; apart from them a token depends only on
    the step's message. Grammar masks follow in a second message; they are made while the ranks compute.
    """

    #: As :class:`engine.core.Runner` has it. Each wait sleeps anyway, and looks after the other ranks.
    idle_waits = False

    def __init__(self, own: ModelRunner, executor: ParallelExecutor) -> None:
        self._own = own
        self._executor = executor
        self._workers = executor.workers
        self._sender = BatchSender()
        self.vocab_size, self.is_asynchronous = own.vocab_size, own.is_asynchronous

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> LaunchedParallelStep:
        """See :meth:`ModelRunner.execute`.

        Raises:
            RequestFault: the work for one request raised, before the step was sent to the other ranks.
            Unavailable: a rank has died; the others were ended.
        """

        def shared_mask(slots: list[int], mask: np.ndarray) -> list[list[int] | None]:
            assert grammar_mask is not None
            settled = grammar_mask(slots, mask)
            self._workers.send((mask, settled))
            return settled

        self._workers.check()
        prepared = self._own.prepare(batch)
        try:
            self._workers.send(self._sender.message(batch, grammar_mask is not None))
            step = self._own.compute(prepared, None if grammar_mask is None else shared_mask)
        except BaseException as error:
            if isinstance(error, Exception) and self._workers.wait_for_loss(_NOTICE_S):
                self._workers.check()
            # After any error the ranks may be at different steps.
            self._workers.give_up(Unavailable(f"Rank 0 of the language model failed: {error!r}"))
            raise
        return LaunchedParallelStep(step, self._workers)

    def recover(self) -> None:
        """Get ready for the next step after one that raised.

        Raises:
            Unavailable: a rank has died, or the ranks may be at different steps.
        """
        self._workers.check()
        self._own.recover()

    def check_idle(self, released: Collection[int]) -> None:
        self._own.check_idle(released)

    def check_health(self) -> None:
        """Raise if a rank has died.

        Raises:
            Unavailable: a rank has died.
        """
        self._workers.check()

    def close(self) -> None:
        self._executor.close()
