"""A step whose work the device has, and the results that it downloads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.logprobs import LogprobTensors
from engine.request import Request
from engine.scheduling.batch import StepResult
from engine.transfers import download, record_event


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
        *,
        idle_wait: bool,
    ) -> None:
        self._tokens = download(tokens)
        self._logprobs = None if logprobs is None else _download(logprobs)
        self._scores = [(request, start, _download(found)) for request, start, found in prompts.scores]
        self._pooled = [(request, download(vector)) for request, vector in prompts.pooled]
        self._failed = prompts.failed
        # One event after all copies: they are on one stream.
        self._event = record_event(tokens.device, idle_wait=idle_wait)

    def ready(self) -> bool:
        """Return True if :meth:`result` returns at once."""
        return self._event is None or self._event.query()

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        pooled = [(request, vector.numpy().copy()) for request, vector in self._pooled]
        return StepResult(self._tokens.numpy().copy(), self._logprobs, self._scores, pooled, self._failed)


def _download(found: LogprobTensors) -> LogprobTensors:
    """Start copying each tensor of ``found`` to the host; see :func:`~engine.transfers.download`."""
    return LogprobTensors(
        download(found.token_logprobs),
        download(found.ranks),
        download(found.top_ids),
        download(found.top_logprobs),
        None if found.wanted_logprobs is None else download(found.wanted_logprobs),
        None if found.wanted_ranks is None else download(found.wanted_ranks),
    )
