"""Ray's own errors become ours. Deliberate ones are :mod:`deployments.ray_serve.refusals`."""

import asyncio

import grpc
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.errors import as_sightline, logger, release
from deployments.ray_serve.refusals import LOST
from deployments.stages import RowsLost, StageLost
from engine.errors import Overloaded, SightlineError, Unavailable

#: The death of a process, of what runs it, or of its host.
_DEATHS = RayActorError | WorkerCrashedError | OutOfMemoryError | NodeDiedError | LocalRayletDiedError

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
        return RowsLost(LOST)
    if isinstance(error, _DEATHS):
        return StageLost(LOST)
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        logger.error("the %s has no room for images in Ray's object store: %r", stage, error)
        return Unavailable("The server has no room for more images at the moment; try again shortly.")
    if isinstance(error, grpc.aio.AioRpcError) and error.code() in _CUT:
        return StageLost(LOST)
    if type(error) is RuntimeError and str(error).startswith(_UNACCEPTED):
        return StageLost(LOST)
    if isinstance(error, DeploymentUnavailableError | RayServeException):
        logger.warning("a part of the server is unavailable: %r", error)
        return Unavailable("A part of the server is not available; try again shortly.")
    if isinstance(error, asyncio.TimeoutError | GetTimeoutError):
        return Unavailable("A part of the server did not answer in time; try again shortly.")
    return as_sightline(error)
