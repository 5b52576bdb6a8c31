"""A line between two processes of one host: a Unix socket that carries a replica's channel to an ingress.

A message of a line costs a tenth of one of a gRPC stream. A line isn't a request for Ray Serve, so it stays
open: a burst of answers after a pause finds it open.

The ingress may ask for answers by the line too (:data:`Asked`). Ray Serve then knows nothing of a request
and its answer, and neither does the replica, if its engine has a process of its own. The arrays of the
request's media go in the same message: one more call of Ray Serve costs both sides more than to copy them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from deployments.errors import as_sightline, logger
from deployments.ray_serve.channel import Asked, Message, Outbox, Outboxes
from deployments.ray_serve.frames import LineEnd, LineServer, ServedLine, connected, framed
from deployments.ray_serve.refusals import abandoned, was_cancelled
from deployments.tracing import current


class Lines(LineServer):
    """The replica's end of lines.

    Args:
        outboxes: of the replica; a line is one that stays open.
        give: puts the answer to a request into an outbox, to its end; called with the outbox, the request and
            its media as in :data:`~deployments.ray_serve.channel.Asked`. Raises what the reader wasn't told.
    """

    def __init__(self, outboxes: Outboxes, give: Callable[..., Awaitable[None]]) -> None:
        super().__init__(partial(_Sender, outboxes, give), "updates go by gRPC alone")


class _Sender(ServedLine):
    """The replica's end of one line. The reader's first message is its name. From then on this end sends its
    updates, until it leaves, and gives the answers that it asks for.

    No task takes part in sending, since a step of the engine has something to send on each line.

    Args:
        outboxes: of the replica.
        give: as of :class:`Lines`.
        connections: as of :class:`~deployments.ray_serve.frames.ServedLine`, whose tasks are answers here, by
            the ids of their requests.
    """

    def __init__(
        self, outboxes: Outboxes, give: Callable[..., Awaitable[None]], connections: set[ServedLine]
    ) -> None:
        super().__init__(connections)
        self._outboxes, self._give = outboxes, give
        self._loop = asyncio.get_running_loop()
        self._open = ExitStack()
        self._outbox: Outbox | None = None
        self._due = self._paused = False

    def _take(self, message: Any) -> None:
        if self._outbox is None:
            self._outbox = self._open.enter_context(self._outboxes.open(message, idle_s=None))
            self._outbox.when_ready(self._soon)
            # Says that this end takes requests.
            self._transport.writelines(framed([]))
        elif isinstance(message, str):
            self._give_up(message)
        else:
            self._begin(message[0].request_id, self._answer(self._outbox, message))

    async def _answer(self, outbox: Outbox, asked: Asked) -> None:
        request, span, infos, arrays = asked
        # The arrays are dropped as soon as they are used.
        del asked
        current.set(span)
        try:
            await self._give(outbox, request, infos, arrays)
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            # Something else was: the reader must not wait.
            outbox.fail(request.request_id, abandoned())
        except Exception as error:
            outbox.fail(request.request_id, as_sightline(error))

    def close(self) -> None:
        """End the line."""
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._outbox is not None:
            self._outbox.close()
        self._open.close()

    def pause_writing(self) -> None:
        # Meanwhile updates are merged: a slow reader costs no memory.
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._soon()

    def _soon(self) -> None:
        """Send when all updates of a step are there."""
        if not (self._due or self._paused):
            self._due = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._due = False
        if self._outbox is None or self._transport.is_closing():
            return
        try:
            for message in self._outbox.take():
                self._transport.writelines(framed(message))
        except Exception:
            # What was taken is lost: the answers must end, as with any line that breaks.
            logger.exception("updates can't be sent")
            self._transport.abort()
            return
        if self._outbox.ended:
            self.close()


class _Reader(LineEnd):
    """The ingress's end of one line.

    Args:
        take: called with each message.
        opened: called when the first one comes, as of :func:`follow`.

    Attributes:
        ended: done when the connection ends.
    """

    def __init__(
        self, take: Callable[[Message], None], opened: Callable[[Callable[[Asked | str], None]], None]
    ) -> None:
        super().__init__()
        self._pass_on, self._opened = take, opened
        self._open = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def say(self, message: Asked | str) -> None:
        """Send a message.

        Raises:
            StageLost: the line has ended.
        """
        if self.ended.done():
            raise abandoned()
        self._transport.writelines(framed(message))

    def close(self) -> None:
        """End the line."""
        self._transport.close()

    def _take(self, message: Message) -> None:
        if not self._open:
            self._open = True
            self._opened(self.say)
        self._pass_on(message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def follow(
    address: str,
    name: str,
    take: Callable[[Message], None],
    opened: Callable[[Callable[[Asked | str], None]], None],
) -> bool:
    """Read a line to its end.

    Args:
        address: see :meth:`Lines.address`.
        name: of the reader.
        take: called with each message.
        opened: called once the other end has let this one in, with a function that asks for an answer by the
            line, or, with the id of a request, gives that request up.

    Returns:
        False if there is no such line, as for a replica on another host.
    """
    reader = await connected(address, lambda: _Reader(take, opened))
    if reader is None:
        return False
    try:
        reader.say(name)
        await reader.ended
    finally:
        reader.close()
    return True
