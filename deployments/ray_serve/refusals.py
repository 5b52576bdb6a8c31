"""Deliberate errors of a replica on their way to its caller: they travel as values."""

import asyncio
import copy
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.stages import StageLost
from engine.errors import SightlineError

T = TypeVar("T")

#: What is said of a stage that was lost.
LOST = "A part of the server stopped while it worked on this request; try again shortly."


class Misrouted(StageLost):
    """A request reached another replica than the one that holds its embeddings."""


class TooLong(SightlineError):
    """A result is too long for a line."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A deliberate error as a result. Serve would log one that is raised as a failure, with a traceback."""

    error: SightlineError


async def answered(work: Awaitable[T]) -> T | Refusal:
    """The result of ``work``, or the deliberate error that it raises."""
    try:
        return await work
    except SightlineError as error:
        return Refusal(error)


def checked(result: Any) -> Any:
    """``result`` as a replica returned it.

    Raises:
        SightlineError: it is a refusal.
    """
    if isinstance(result, Refusal):
        # A copy: the error's traceback keeps frames that keep ``result``, a cycle as in
        # :func:`deployments.ray_serve.failures.translated`.
        raise copy.copy(result.error)
    return result


def was_cancelled() -> bool:
    """Return whether the current task is being cancelled.

    Serve raises ``CancelledError`` in a caller also where the replica has cancelled the call, as it does when
    it shuts down. The caller itself goes on then.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def abandoned() -> StageLost:
    """The error for a call that the replica has cancelled."""
    return StageLost(LOST)
