"""Errors on their way through Ray: refusals travel as values, Ray's own errors become ours."""

import asyncio
import copy
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.errors import as_sightline, logger, release
from deployments.stages import RowsLost, StageLost
from engine.errors import Overloaded, SightlineError, Unavailable

T = TypeVar("T")

_LOST = "A part of the server stopped while it worked on this request; try again shortly."
#: How a stream ends whose connection broke, apart from ``UNAVAILABLE``, which Serve translates.
_CUT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}

#: How the RuntimeError begins that Serve raises if a call ended before the replica's acceptance came.
_UNACCEPTED = "Unexpected error (StatusCode."


class Misrouted(StageLost):
    """A request reached another replica than the one that holds its embeddings."""


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
        # A copy: the error's traceback keeps frames that keep ``result``, a cycle as in :func:`translated`.
        raise copy.copy(result.error)
    return result


def translated(error: Exception, stage: str) -> SightlineError:
    """The error to report for ``error``, which a call of a replica of ``stage`` raised.

    The frames that ``error`` has come through are cleared. Serve's hold the call's arguments and the future
    that keeps the error: a cycle, which would keep objects in Ray's store until the next garbage collection.
    """
    reported = _translated(error, stage)
    release(error)
    return reported


def _translated(error: Exception, stage: str) -> SightlineError:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        # Errors raised in a replica arrive wrapped.
        error = error.cause
    if isinstance(error, SightlineError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded(f"Too many requests wait for the {stage} at the moment; try again shortly.")
    if isinstance(error, ObjectLostError):
        return RowsLost(_LOST)
    if isinstance(error, RayActorError | WorkerCrashedError | OutOfMemoryError | NodeDiedError):
        return StageLost(_LOST)
    if isinstance(error, grpc.aio.AioRpcError) and error.code() in _CUT:
        return StageLost(_LOST)
    if type(error) is RuntimeError and str(error).startswith(_UNACCEPTED):
        return StageLost(_LOST)
    if isinstance(error, DeploymentUnavailableError | RayServeException):
        logger.warning("a part of the server is unavailable: %r", error)
        return Unavailable("A part of the server is not available; try again shortly.")
    if isinstance(error, asyncio.TimeoutError | GetTimeoutError):
        return Unavailable("A part of the server did not answer in time; try again shortly.")
    return as_sightline(error)


def was_cancelled() -> bool:
    """Return whether the current task is being cancelled.

    Serve raises ``CancelledError`` in a caller also where the replica has cancelled the call, as it does when
    it shuts down. The caller itself goes on then.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def abandoned() -> StageLost:
    """The error for a call that the replica has cancelled."""
    return StageLost(_LOST)
