"""One line in the log for each request, when it has ended."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import ANTHROPIC_PATH, as_sightline, logger, request_name
from deployments.leaving import ABORT, PIECES
from deployments.report import Report, SentResponse, begin_report

#: Requests of machines at short intervals, and files of the page. Their successes are logged at DEBUG.
_QUIET_PATHS = ("/health", "/ping", "/version", "/load", "/metrics", "/favicon.ico", "/page/")


class RequestLog:
    """The outermost part of the application: gives each request its id, and logs it when it has ended.

    Args:
        echo_id: send the id in the header ``x-request-id``. Ray Serve's proxies do this themselves.
        new_id: makes a unique id.
    """

    def __init__(self, echo_id: bool, new_id: Callable[[], str]) -> None:
        self._echo_id = echo_id
        self._new_id = new_id

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` with its requests logged."""

        async def log(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            report = begin_report(scope, self._new_id)
            headers = [(b"x-request-id", report.id.encode())] if self._echo_id else []
            if scope["path"].startswith(ANTHROPIC_PATH):
                # Anthropic's clients look for it under this name.
                headers.append((b"request-id", report.id.encode()))
            if _asks_for_another_protocol(scope):
                # uvicorn reads no body then, and would take what comes behind the head for the next request.
                headers.append((b"connection", b"close"))
            pieces, abort, bodiless = scope.get(PIECES), scope.get(ABORT), scope["method"] == "HEAD"
            response = SentResponse(send, headers, pieces, abort, bodiless=bodiless)
            report.response = response
            try:
                await app(scope, receive, response)
            except Exception as error:
                report.error = report.error or as_sightline(error)
                raise
            finally:
                log_request(report, scope, response.complete)

        return log


def _asks_for_another_protocol(scope: Scope) -> bool:
    return scope["method"] == "CONNECT" or any(name == b"upgrade" for name, _ in scope["headers"])


def log_request(report: Report, scope: Scope, complete: bool) -> None:
    """Write the line of a request.

    Args:
        complete: the whole response was sent. Without an error it is not if the client has left.
    """
    level = _level(report, scope["path"])
    if not logger.isEnabledFor(level):
        return
    name, fields = request_name(scope), _fields(report)
    words = [f"{key}={value}" for key, value in fields.items()]
    error, left = report.error, not complete and report.error is None and not report.stalled
    text = f"{name}: {report.status}" if report.status is not None else f"{name}:"
    if report.stalled:
        text += " the client did not read it to its end"
    elif left:
        text += " the client left before its end" if report.status is not None else " the client left"
    if error is not None:
        # An error within a stream comes after the status 200.
        code = error.code if report.status == error.status else f"then {error.status} {error.code}"
        where = f" ({error.param})" if error.param else ""
        # Line breaks in a message would look like further records.
        message = error.message[:500].replace("\n", "\\n")
        text += f" {code}{where}: {message}"
        fields |= {"error": error.code, "error_message": message, "error_param": error.param}
        fields["error_status"] = error.status
    details = {
        "method": scope["method"][:20],
        "path": scope["path"][:200],
        "status": report.status,
        "client_left": left,
        **fields,
    }
    logger.log(level, "%s %s", text, " ".join(words), extra=details)


def _level(report: Report, path: str) -> int:
    if report.error is not None and report.error.status >= 500:
        return logging.WARNING
    quiet = report.error is None and path.startswith(_QUIET_PATHS)
    return logging.DEBUG if quiet else logging.INFO


def _fields(report: Report) -> dict[str, Any]:
    """Fields of the line about a request that got as far as a model; absent values are left out."""
    fields: Mapping[str, Any] = {
        "request_id": report.id,
        "answer_id": report.answer,
        "key": report.key,
        "model": report.model,
        "prompt_tokens": report.usage.prompt_tokens,
        "cached_tokens": report.usage.cached_tokens,
        "completion_tokens": report.usage.completion_tokens,
        "images": len(report.media),
    }
    times = {f"{name}_ms": value for name, value in report.times().items()}
    return {name: value for name, value in fields.items() if value} | times
