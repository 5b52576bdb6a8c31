"""A step whose work the device has, and the results that it downloads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.logprobs import LogprobTensors
from engine.request import Request
from engine.runner.step_buffer import HostMemory
from engine.scheduling.batch import StepResult
from engine.transfers import download

#: Seconds between two looks whether a step is computed: at least this, and this share of the time that was
#: waited already, so that a long step takes few looks. An event that wakes the thread does so later.
_LOOK_S = 5e-5
_LOOK_SHARE = 0.02


@dataclass(slots=True)
class PromptResults:
    """Results of a step's prompts beside their next tokens; see :class:`StepResult`."""

    scores: list[tuple[Request, int, LogprobTensors]]
    pooled: list[tuple[Request, torch.Tensor]]
    failed: list[tuple[Request, Exception]]


class LaunchedStep:
    """A step whose work is enqueued. :meth:`result` waits for it."""

    def __init__(
        self,
        tokens: torch.Tensor,
        logprobs: LogprobTensors | None,
        prompts: PromptResults,
        memory: HostMemory,
        give_back: Callable[[HostMemory], None],
        *,
        idle_wait: bool,
    ) -> None:
        """``memory`` takes the tokens, and is given back once they are read. With ``idle_wait`` whoever waits
        leaves the core to others."""
        self._memory, self._give_back, self._idle_wait = memory, give_back, idle_wait
        self._tokens = memory.tokens_array[: len(tokens)]
        memory.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._logprobs = None if logprobs is None else _download(logprobs)
        self._scores = [(request, start, _download(found)) for request, start, found in prompts.scores]
        self._pooled = [(request, download(vector)) for request, vector in prompts.pooled]
        self._failed = prompts.failed
        # Behind all copies: they are on one stream.
        if memory.event is not None:
            memory.event.record()

    def ready(self) -> bool:
        """Return True if :meth:`result` returns at once."""
        return self._memory.event is None or self._memory.event.query()

    def result(self) -> StepResult:
        """Wait for the step's result; called once."""
        if (event := self._memory.event) is not None:
            start = time.monotonic()
            while self._idle_wait and not event.query():
                time.sleep(max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - start)))
            event.synchronize()
        tokens = self._tokens.copy()
        self._give_back(self._memory)
        pooled = [(request, vector.numpy().copy()) for request, vector in self._pooled]
        return StepResult(tokens, self._logprobs, self._scores, pooled, self._failed)


def _download(found: LogprobTensors) -> LogprobTensors:
    """Start copying each tensor of ``found`` to the host; see :func:`~engine.transfers.download`."""
    return LogprobTensors(
        download(found.token_logprobs),
        download(found.ranks),
        download(found.top_ids),
        download(found.top_logprobs),
        None if found.wanted_logprobs is None else download(found.wanted_logprobs),
    )
