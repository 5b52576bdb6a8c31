"""Errors as OpenAI's and Anthropic's error JSON."""

import asyncio
import logging
import traceback
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from deployments.report import current_report
from engine.errors import Overloaded, SightlineError, Unavailable

#: Ray Serve sends this logger's records to its files and to the console, with the request's id.
logger = logging.getLogger("ray.serve")

#: Seconds that a caller should wait before it tries again, by status, unless the error itself says it.
RETRY_AFTER = {429: 1, 503: 3}

#: Endpoints below this path speak Anthropic's protocol; all others OpenAI's.
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class BadBody(SightlineError):
    """The request's body is no JSON object of the form that the endpoint wants."""

    status = 400
    code = "invalid_request"


class UnsupportedParameter(SightlineError):
    """A field asks for something that isn't offered and would change the answer."""

    status = 400
    code = "unsupported_parameter"


class BodyTooLarge(SightlineError):
    status = 413
    code = "request_too_large"


class BodyTooSlow(SightlineError):
    """The rest of a body has not come in time."""

    status = 408
    code = "request_timeout"


class NoSuchRoute(SightlineError):
    status = 404
    code = "not_found"


class NotFound(SightlineError):
    """Something of this id is not kept here."""

    status = 404
    code = "not_found"


class WrongMethod(SightlineError):
    """The path takes other methods.

    Args:
        methods: those that it takes.
    """

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, methods: Collection[str]) -> None:
        super().__init__(message)
        self.methods = sorted(methods)


def as_sightline(error: BaseException) -> SightlineError:
    """The error to report to the caller. Any error that is not meant for callers is logged, and becomes a 500
    without details."""
    if isinstance(error, SightlineError):
        return error
    if isinstance(error, asyncio.TimeoutError):
        return Unavailable("A part of the server did not answer in time; try again shortly.")
    logger.error("a request failed", exc_info=error)
    return SightlineError("Internal error; the server's log has the details.")


def release(error: BaseException) -> None:
    """Clear the local variables of the frames that ``error`` and its causes have come through and that have
    ended. They hold a request's media, or references to them in Ray's store, as long as anything keeps the
    error."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def error_body(error: SightlineError) -> dict[str, Any]:
    """OpenAI's error object."""
    if error.status < 500:
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    else:
        kind = "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error_body(error: SightlineError) -> dict[str, Any]:
    """Anthropic's error object. It has no field for the parameter at fault, so the message names it."""
    message = error.message
    if error.code == "context_length_exceeded":
        # Clients search for these words.
        message = f"prompt is too long: {message}"
    elif error.param and error.param not in message:
        message = f"{error.param}: {message}"
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": current_report().id or None,
    }


def error_headers(error: SightlineError) -> dict[str, str]:
    """Headers of an error's response."""
    if isinstance(error, WrongMethod):
        return {"Allow": ", ".join(error.methods)}
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    wait = RETRY_AFTER.get(error.status)
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        wait = error.retry_after_s
    return {} if wait is None else {"Retry-After": str(wait)}


def error_response(error: SightlineError, scope: Scope) -> JSONResponse:
    """An error as a whole response, in the form of the path's protocol; the request's line in the log will
    name it."""
    current_report().error = error
    form = anthropic_error_body if scope["path"].startswith(ANTHROPIC_PATH) else error_body
    return JSONResponse(form(error), error.status, error_headers(error))


def request_name(scope: Scope) -> str:
    """The method and path of a request, without line breaks and bounded: they are the client's."""
    return repr(f"{scope['method']} {scope['path']}"[:200])[1:-1]
