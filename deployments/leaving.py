"""Ends work for clients that leave."""

import asyncio
from collections.abc import Awaitable, Generator
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Key of a scope: the :class:`WhileListenedTo` in which the work on the request is done.
ENDS = "sightline.ends_with_client"
#: Key of a scope: breaks the connection to the client off, where that can be done from here.
ABORT = "sightline.abort"
#: Key of a scope: a send for all body pieces but the last, past layers that need only a response's start and
#: end.
PIECES = "sightline.pieces"

#: Nothing reads a body of these requests.
_WITHOUT_BODY = ("GET", "HEAD")


class WhileListenedTo:
    """A block that ends early when the client leaves.

    Starlette's own way to do this, two tasks of a group, takes three times as long.

    Args:
        receive: the server's.
        stays_cancelled: the block ends with CancelledError then, for servers that look for it; else without
            an error.
    """

    def __init__(self, receive: Receive, *, stays_cancelled: bool = False) -> None:
        self._receive, self._stays_cancelled = receive, stays_cancelled
        self._client: asyncio.Future[None] | None = None
        self._left = False

    async def __aenter__(self) -> "WhileListenedTo":
        task = asyncio.current_task()
        assert task is not None, "responses are sent by tasks"
        self._task, self._cancellations = task, task.cancelling()
        return self

    def listen(self) -> None:
        """Begin to; the body must have been read."""
        if self._client is None:
            self._client = asyncio.ensure_future(self._wait())

    def stop(self) -> None:
        """Listen no more: the rest of the response is being sent, and servers say the same once it is."""
        if self._client is not None:
            self._client.cancel()

    async def _wait(self) -> None:
        # A connection that can't be read has no client any more.
        with suppress(Exception):
            while (await self._receive())["type"] != "http.disconnect":
                continue
        self._left = True
        self._task.cancel()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.stop()
        if not isinstance(error, asyncio.CancelledError) or not self._left:
            return False
        return self._task.uncancel() <= self._cancellations and not self._stays_cancelled


def ends_with_client(app: ASGIApp, *, stays_cancelled: bool = False) -> ASGIApp:
    """``app``, whose work on a request ends when the client leaves before it is answered.

    Args:
        stays_cancelled: see :class:`WhileListenedTo`.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def take() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                client.listen()
            return message

        async def give(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                client.stop()
            await send(message)

        async with WhileListenedTo(receive, stays_cancelled=stays_cancelled) as client:
            scope = {PIECES: send, **scope, ENDS: client}
            if scope["method"] in _WITHOUT_BODY:
                client.listen()
            await app(scope, take, give)

    return answer


class ClientStalled(Exception):
    """A client has not read for so long that nothing more could be sent."""


class Begun:
    """The rest of something that was awaited without a task, up to where it waits.

    Args:
        rest: its iterator.
        waits_for: what that has given.
    """

    def __init__(self, rest: Generator[Any, Any, None], waits_for: Any) -> None:
        self._rest, self._waits_for = rest, waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waits_for
        except BaseException as error:
            self._rest.throw(error)
            raise
        yield from self._rest


async def sent_within(seconds: float | None, sending: Awaitable[None]) -> None:
    """Wait for ``sending``, which nearly always is done at once.

    Raises:
        ClientStalled: it isn't done after so many seconds.
    """
    begun = sending.__await__()
    try:
        waits_for = next(begun)
    except StopIteration:
        return
    await rest_within(seconds, Begun(begun, waits_for))


async def rest_within(seconds: float | None, rest: Begun) -> None:
    """As :func:`sent_within`, for something that has begun and waits."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            await rest
    except TimeoutError:
        if limit.expired():
            raise ClientStalled from None
        raise
