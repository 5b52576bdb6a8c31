"""HTTP clients of an application in the same process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import httpx2


class AppTransport(httpx.AsyncBaseTransport):
    """Sends requests to an ASGI application; httpx's own one waits for the whole answer before it returns.

    A client that closes a response or cancels its request is gone. The application learns of it as in Ray
    Serve: the task that runs it is cancelled.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        status, headers, exchange = await _exchange(self._app, request)
        return httpx.Response(status, headers=headers, stream=exchange)


class AppTransport2(httpx2.AsyncBaseTransport):
    """The transport for httpx2, which Anthropic's client is built on."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        status, headers, exchange = await _exchange(self._app, request)
        return httpx2.Response(status, headers=headers, stream=exchange)


async def _exchange(app: Any, request: Any) -> tuple[int, Any, "Exchange"]:
    """Send a request; the status, headers and body of its answer."""
    exchange = Exchange(app, _scope(request), [part async for part in request.stream])
    try:
        start = await exchange.next_message()
    except BaseException:
        await exchange.aclose()
        raise
    return start["status"], start["headers"], exchange


class Exchange(httpx.AsyncByteStream, httpx2.AsyncByteStream):
    """One request and its answer.

    Args:
        body: parts of the request's body.
        then: what comes after them: nothing, since they are all (``end``); nothing, though more was announced
            (``wait``); or the news that the client has left (``leave``).

    Attributes:
        read: parts of the body that the application has taken.
    """

    def __init__(
        self,
        app: Any,
        scope: dict[str, Any],
        body: list[bytes],
        *,
        then: Literal["end", "wait", "leave"] = "end",
    ) -> None:
        self._body = list(body) or [b""]
        self._then = then
        self._more = True
        self.read = 0
        # As a connection does, it takes no more from the application than the client reads.
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        self._task = asyncio.ensure_future(app(scope, self._receive, self._messages.put))

    async def finished(self) -> None:
        """Wait until the application is done with the request; raise what it raised."""
        await self._task

    async def next_message(self) -> dict[str, Any]:
        """The application's next message; its exception if it has raised one."""
        get = asyncio.ensure_future(self._messages.get())
        try:
            await asyncio.wait({get, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if get.done() or not self._messages.empty():
                return await get
            self._task.result()
            raise AssertionError("the application ended without an answer")
        finally:
            get.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        # Clients look whether something follows the last piece.
        while self._more:
            message = await self.next_message()
            self._more = message.get("more_body", False)
            yield message.get("body", b"")

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _receive(self) -> dict[str, Any]:
        if self.read < len(self._body):
            part = self._body[self.read]
            self.read += 1
            more = self._then != "end" or self.read < len(self._body)
            return {"type": "http.request", "body": part, "more_body": more}
        if self._then == "leave":
            return {"type": "http.disconnect"}
        return await asyncio.Future()


def _scope(request: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path,
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 1),
        "server": (request.url.host, request.url.port),
    }
