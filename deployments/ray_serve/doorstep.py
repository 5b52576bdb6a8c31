"""What stands before Ray Serve in the HTTP servers of the ingress's replicas.

To learn that a client leaves, Ray Serve takes two tasks, a queue and a wait for each request, and every piece
of a response goes through two functions of its own. Where its servers have this, the application looks after
clients that leave (:class:`deployments.ray_serve.ingress.Disconnects`), as Ray Serve's header
``x-request-disconnect-disabled`` asks for, and pieces of a response go straight to the connection.
"""

from collections.abc import Awaitable, Callable, Generator
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.leaving import PIECES

#: Where the class is whose ``send`` uvicorn gives, which Ray Serve brings with it.
_UVICORN = "uvicorn.protocols.http.httptools_impl"


def middlewares() -> list[Middleware]:
    """What ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` may name. Ray Serve's proxies and replicas of other
    applications call it too, and get nothing."""
    return [Middleware(Doorstep)] if Doorstep.wanted else []


class Doorstep:
    """Has the application learn by itself that a client leaves, and send pieces of responses itself.

    Attributes:
        wanted: this process has such an application.
    """

    wanted = False

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[PIECES] = _pieces(send)
            scope["headers"].append((b"x-request-disconnect-disabled", b"?1"))
        await self._app(scope, receive, send)


def _pieces(send: Send) -> Callable[[Message], Awaitable[None]]:
    """What does as ``send`` for pieces of a body, with a fifth of its work where that is uvicorn's."""
    answer: Any = getattr(send, "__self__", None)
    if type(answer).__module__ != _UVICORN:
        return send
    flow, write = answer.flow, answer.transport.write

    def give(piece: Message) -> Awaitable[None]:
        data = piece["body"]
        # A chunk without data would end the response.
        if flow.write_paused or answer.disconnected or not answer.chunked_encoding or not data:
            return send(piece)
        write(b"%x\r\n%b\r\n" % (len(data), data))
        return _WRITTEN

    return give


class _Written:
    """Something to be awaited that is done."""

    def __await__(self) -> Generator[None, None, None]:
        return iter(())  # type: ignore[return-value]


_WRITTEN = _Written()
