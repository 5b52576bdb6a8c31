"""Whatever goes wrong, as OpenAI's error JSON."""

import asyncio
import logging
from typing import Any

from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from engine.errors import Overloaded, SightlineError, Unavailable

logger = logging.getLogger("ray.serve")

#: What a caller may wait before it tries again, in seconds.
RETRY_AFTER = {429: 1, 503: 3}


class BadBody(SightlineError):
    """The request's body is no JSON object of the form that the endpoint wants."""

    status = 400
    code = "invalid_request"


class BodyTooLarge(SightlineError):
    status = 413
    code = "request_too_large"


class Misrouted(Unavailable):
    """A request reached another replica than the one that holds its embeddings."""


class NoSuchRoute(SightlineError):
    status = 404
    code = "not_found"


class WrongMethod(SightlineError):
    status = 405
    code = "method_not_allowed"


def as_sightline(error: BaseException) -> SightlineError:
    """The error to tell the caller of. What is not meant for callers is logged, and becomes a plain 500."""
    if isinstance(error, RayTaskError):
        # An error raised in a replica comes wrapped.
        error = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, SightlineError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("The server has too many requests at the moment; try again shortly.")
    if is_lost(error) or isinstance(error, DeploymentUnavailableError | RayServeException):
        logger.warning("a request lost a part of the server: %r", error)
        return Unavailable("A part of the server stopped while it worked on this request; try again shortly.")
    if isinstance(error, asyncio.TimeoutError | GetTimeoutError):
        return Unavailable("A part of the server did not answer in time; try again shortly.")
    logger.error("a request failed", exc_info=error)
    return SightlineError("Internal error; the server's log has the details.")


def is_lost(error: BaseException) -> bool:
    """Whether a replica died, or an object with the replica that made it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return isinstance(error, RayActorError | ObjectLostError)


def error_body(error: SightlineError) -> dict[str, Any]:
    """OpenAI's error object."""
    if error.status < 500:
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    else:
        kind = "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: SightlineError) -> dict[str, str]:
    """Headers of an error's response."""
    wait = RETRY_AFTER.get(error.status)
    return {} if wait is None else {"Retry-After": str(wait)}
