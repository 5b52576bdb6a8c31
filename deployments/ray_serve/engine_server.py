"""The process of a language model's engine: does what its replica asks for.

Everything that there is to do for each token happens here, up to the bytes on an ingress's line. The replica,
see :mod:`deployments.ray_serve.engine_process`, has the work that Ray and Ray Serve have with each request.
"""

import asyncio
import contextvars
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvloop

from deployments.errors import as_sightline, logger
from deployments.logs import Rendered
from deployments.ray_serve.channel import IDLE_S, Outbox, Outboxes
from deployments.ray_serve.engine_link import Call, Cancel, Close, Line, Link, Ready, Reply, Setup
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.refusals import abandoned, was_cancelled
from deployments.ray_serve.served_model import ServedModel
from deployments.threads import ENGINE_TURN_S
from deployments.tracing import current


class NotedOutboxes(Outboxes):
    """Tells the replica which lines are open."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    @contextmanager
    def open(self, reader: str, idle_s: float | None = IDLE_S) -> Iterator[Outbox]:
        with super().open(reader, idle_s) as outbox:
            self._link.send(Line(reader, True))
            try:
                yield outbox
            finally:
                # The reader may have opened another one. Or this process ends, because the replica has.
                if self._open.get(reader) is outbox:
                    with suppress(OSError):
                        self._link.send(Line(reader, False))


class LogsAtReplica(logging.Handler):
    """Hands records to the replica, into whose log they go."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.addFilter(Rendered())
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Its text is in the record; see `deployments.logs.Rendered`.
            record.exc_info = None
            self._link.send(record)
        except Exception:
            self.handleError(record)


class _Calls:
    """Runs calls of the replica on this process's event loop.

    Args:
        model: what they are calls of.
        link: to the replica.
    """

    def __init__(self, model: ServedModel, link: Link) -> None:
        self._model, self._link = model, link
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, call: Call) -> None:
        # In a context of its own, for its span.
        task = contextvars.Context().run(asyncio.ensure_future, self._run(call))
        self._tasks[call.number] = task
        task.add_done_callback(lambda _: self._tasks.pop(call.number))

    def cancel(self, call: Cancel) -> None:
        # It may have ended meanwhile.
        if (task := self._tasks.get(call.number)) is not None:
            task.cancel()

    async def _run(self, call: Call) -> None:
        current.set(call.span)
        try:
            reply = Reply(call.number, await getattr(self._model, call.method)(*call.args))
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            # Something else was: the replica must not wait.
            reply = Reply(call.number, error=abandoned())
        except AssertionError as error:
            reply = Reply(call.number, error=error)
        except Exception as error:
            reply = Reply(call.number, error=as_sightline(error))
        try:
            self._link.send(reply)
        except OSError:
            # The replica has died.
            raise
        except Exception as error:
            # It can't be pickled. No byte of it was sent.
            self._link.send(Reply(call.number, error=as_sightline(error)))


class EngineServer:
    """Does what the replica says, from its first message on.

    Args:
        link: to the replica.
        loop: on which calls run.
        on_loss: called on another thread when the replica has died.
    """

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop, on_loss: Callable[[], None]) -> None:
        self._link, self._loop, self._on_loss = link, loop, on_loss
        self._closing = asyncio.Event()
        self._calls: _Calls | None = None
        # From the beginning: a load takes a minute, and the replica may die meanwhile.
        threading.Thread(target=self._receive, name="engine-calls", daemon=True).start()

    async def run(self, home: str, model: ServedModel, outboxes: Outboxes) -> None:
        """Run calls until the replica says that this is enough.

        Args:
            home: the name by which the replica reads answers itself.
            model: what they are calls of.
            outboxes: of the model's lines.
        """
        self._calls = _Calls(model, self._link)
        with outboxes.open(home, idle_s=None) as outbox:
            bringing = asyncio.ensure_future(self._bring_home(outbox))
            self._link.send(Ready(await model.line()))
            await self._closing.wait()
            bringing.cancel()

    async def _bring_home(self, outbox: Outbox) -> None:
        """Send the replica the updates of the answers that it reads itself."""
        async for message in outbox.messages():
            self._link.send(message)

    def _receive(self) -> None:
        try:
            while True:
                # No variable keeps the last message.
                self._loop.call_soon_threadsafe(self._take, self._link.receive())
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("what the replica says can't be read")
        self._on_loss()

    def _take(self, message: Call | Cancel | Close) -> None:
        assert self._calls is not None
        if isinstance(message, Close):
            self._closing.set()
        elif isinstance(message, Cancel):
            self._calls.cancel(message)
        else:
            self._calls.begin(message)


def main(connection: socket.socket) -> None:
    """Serve the replica at the other end of ``connection``."""
    # Ctrl-C in a terminal is for the whole server; this process ends with its replica.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(connection)
    setup: Setup = link.receive()
    # The loop of Ray Serve's replicas, too. A message by a line takes a third of asyncio's time.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = EngineServer(link, runner.get_loop(), lambda: os._exit(1))
        logging.getLogger("ray.serve").addHandler(LogsAtReplica(link))
        prepare_process(ENGINE_TURN_S)
        outboxes = NotedOutboxes(link)
        try:
            model = ServedModel.load(setup.engine, setup.encoder, setup.tracing, outboxes)
        except Exception as error:
            link.send(Ready(error=as_sightline(error)))
            return
        # The replica sees the socket close.
        model.when_dead(lambda: os._exit(1))
        runner.run(server.run(setup.home, model, outboxes))
    model.close()
    if setup.tracing is None:
        # Skip finalizers, which complain about each other. Spans are sent by one.
        os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
