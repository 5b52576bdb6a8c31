"""A language model whose engine has a process of its own, as its replica uses it.

The interpreter runs one thread of a process at a time. In one process the engine's threads wait for the work
that Ray, Ray Serve and gRPC have with each request, about as much as the engine's own, and that waits for
them. Tokens don't pass through the replica: the engine's process writes them to the ingress's line.
"""

import asyncio
import copy
import itertools
import logging
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from deployments.errors import as_sightline, logger
from deployments.metrics.families import Family
from deployments.ray_serve.channel import Answer, Message, deliver
from deployments.ray_serve.engine_link import Call, Cancel, Close, Line, Link, Ready, Reply, Setup
from deployments.ray_serve.packing import Encoded, PixelsInfo, RowsInfo
from deployments.ray_serve.refusals import abandoned
from deployments.stage_config import EncoderConfig
from deployments.stages import Generation, Pooling
from deployments.tracing import TracingConfig, current
from engine.config import EngineConfig
from engine.errors import Unavailable
from engine.executor.launch import fresh_interpreter
from engine.mailbox import Relay
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.prompt import EmbeddedMedia

#: Seconds that the process has to end in good order.
_GRACE_S = 5.0
#: Seconds from the end of its socket to its own.
_LAST_S = 2.0

#: Checks of its health in a row that the process leaves unanswered before it is killed: as many as Ray Serve
#: lets a replica fail.
_UNANSWERED = 3

#: The name by which the replica reads answers itself.
_HOME = "replica"


class EngineProcess:
    """Does what :class:`~deployments.ray_serve.served_model.ServedModel` does in the other process.

    Args:
        process: the other one, which runs :mod:`deployments.ray_serve.engine_server`.
        connection: to it.
        engine: the model and how to run it; loading happens here, and takes its time.
        encoder: of the encoder there; None if it has none.
        tracing: where spans go.
        on_death: called on another thread when the process has died.
        patience_s: seconds that it may take to answer whether it is well.

    Raises:
        CheckpointError, ConfigError: the model can't be loaded or run.
        Unavailable: the process died.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        engine: EngineConfig,
        encoder: EncoderConfig | None,
        tracing: TracingConfig | None,
        on_death: Callable[[], None],
        patience_s: float,
    ) -> None:
        self._process, self._link = process, Link(connection)
        self._on_death, self._patience_s = on_death, patience_s
        self._unanswered = 0
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._answers: dict[str, Answer] = {}
        self._readers: set[str] = set()
        self._ended = self._closing = False
        self._line = self._load(Setup(engine, encoder, tracing, _HOME))
        # The event loop must not wait until the process has read megabytes.
        self._outgoing: queue.SimpleQueue[Call | Cancel | Close] = queue.SimpleQueue()
        for work, name in ((self._send, "engine-calls"), (self._receive, "engine-replies")):
            threading.Thread(target=work, name=name, daemon=True).start()

    @classmethod
    def start(
        cls,
        engine: EngineConfig,
        encoder: EncoderConfig | None,
        tracing: TracingConfig | None,
        on_death: Callable[[], None],
        patience_s: float,
    ) -> "EngineProcess":
        """Start the process; arguments and errors as above. It ends with this one, however this one ends."""
        ours, theirs = socket.socketpair()
        with theirs:
            command, environment = fresh_interpreter("deployments.ray_serve.engine_server", theirs.fileno())
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return cls(process, ours, engine, encoder, tracing, on_death, patience_s)

    async def line(self) -> str:
        """Address of the lines; see :meth:`deployments.ray_serve.line.Lines.address`."""
        return self._line

    async def answered(self) -> None:
        """As that of ``ServedModel``."""
        await self._call("answered")

    def has_line(self, reader: str) -> bool:
        """Return whether a line to ``reader`` is open."""
        return reader in self._readers

    async def embedded(
        self, infos: Sequence[RowsInfo | PixelsInfo], arrays: Sequence[np.ndarray]
    ) -> tuple[list[EmbeddedMedia], list[Encoded]]:
        """As that of ``ServedModel``."""
        return await self._call("embedded", infos, arrays)

    async def answer(
        self,
        request: Generation,
        infos: Sequence[RowsInfo | PixelsInfo],
        arrays: Sequence[np.ndarray],
        reader: str,
    ) -> None:
        """As that of ``ServedModel``."""
        await self._call("answer", request, infos, arrays, reader)

    async def generate(
        self, request: Generation, media: Sequence[EmbeddedMedia], relay: Relay | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        """As that of ``ServedModel``."""
        name = request.request_id
        answer = self._answers[name] = Answer(relay)

        async def call() -> None:
            try:
                infos = [RowsInfo.of(each) for each in media]
                await self._call("answer", request, infos, [each.rows for each in media], _HOME)
            except Exception as error:
                answer.fail(as_sightline(error))

        task = asyncio.create_task(call())
        try:
            finished = False
            while not finished:
                update = await answer.get()
                assert isinstance(update, StreamUpdate)
                finished = update.finished
                yield update
        finally:
            task.cancel()
            if self._answers.get(name) is answer:
                del self._answers[name]

    async def embed(
        self, request: Pooling, infos: Sequence[RowsInfo | PixelsInfo], arrays: Sequence[np.ndarray]
    ) -> tuple[EmbeddingOutput, list[Encoded]]:
        """As that of ``ServedModel``."""
        return await self._call("embed", request, infos, arrays)

    async def max_model_len(self) -> int:
        """As that of ``ServedModel``."""
        return await self._call("max_model_len")

    async def device(self) -> str:
        """As that of ``ServedModel``."""
        return await self._call("device")

    async def metrics(self) -> dict[str, Any]:
        """As that of ``ServedModel``."""
        return await self._call("metrics")

    async def families(self) -> list[Family]:
        """As that of ``ServedModel``."""
        return await self._call("families")

    async def encoder_families(self) -> list[Family]:
        """As that of ``ServedModel``."""
        return await self._call("encoder_families")

    async def is_idle(self) -> bool:
        """As that of ``ServedModel``."""
        return await self._call("is_idle")

    async def check_health(self) -> None:
        """As that of ``ServedModel``.

        Ray Serve kills a replica that is not well. A process that is stopped, or stays in a call that holds
        the interpreter, would not notice that: it is killed here, and the replica leaves.
        """
        try:
            async with asyncio.timeout(self._patience_s):
                await self._call("check_health")
            self._unanswered = 0
        except TimeoutError:
            self._unanswered += 1
            if self._unanswered == _UNANSWERED:
                logger.error("the process of the engine is killed, because it does not answer")
                self._process.kill()
            raise Unavailable("The process of the engine does not answer.") from None

    def close(self) -> None:
        """Stop the engine, and return when its process has ended."""
        self._closing = True
        self._outgoing.put(Close())
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._link.close()

    def _load(self, setup: Setup) -> str:
        """Have the process load the model; the address of its lines."""
        try:
            self._link.send(setup)
            while not isinstance(message := self._link.receive(), Ready):
                self._take(message)
        except (EOFError, OSError):
            raise Unavailable(
                f"The process of the engine died while it loaded the model: {self._ending()}."
            ) from None
        if message.error is not None:
            self._process.wait()
            raise message.error
        return message.line

    async def _call(self, method: str, *args: Any) -> Any:
        """Call a method there.

        Raises:
            SightlineError: the method's.
            StageLost: the process has died.
        """
        self._loop = asyncio.get_running_loop()
        number = next(self._numbers)
        future = self._calls[number] = self._loop.create_future()
        try:
            if self._ended:
                raise abandoned()
            self._outgoing.put(Call(number, method, args, current.get()))
            reply: Reply = await future
        except asyncio.CancelledError:
            self._outgoing.put(Cancel(number))
            raise
        finally:
            self._calls.pop(number, None)
        if reply.error is not None:
            # A copy: the traceback's frames keep the reply, which would keep the traceback.
            raise copy.copy(reply.error)
        return reply.result

    def _send(self) -> None:
        try:
            while True:
                # No variable keeps the last message, which may hold objects of Ray's store.
                self._send_one(self._outgoing.get())
        except OSError:
            # The process has ended, and the other thread learns it too.
            return

    def _send_one(self, message: Call | Cancel | Close) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise
        except Exception as error:
            # It can't be pickled. No byte of it was sent, so that the next ones can be.
            assert isinstance(message, Call), "the others hold nothing"
            self._soon(self._settle, Reply(message.number, error=as_sightline(error)))

    def _receive(self) -> None:
        try:
            while True:
                self._take(self._link.receive())
        except (EOFError, OSError):
            self._abandon_calls()
            if not self._closing:
                logger.error("the process of the engine has died: %s", self._ending())
        except Exception:
            logger.exception("what the process of the engine says can't be read")
            self._abandon_calls()
        if not self._closing:
            self._on_death()

    def _abandon_calls(self) -> None:
        self._ended = True
        for number in list(self._calls):
            self._soon(self._settle, Reply(number, error=abandoned()))

    def _ending(self) -> str:
        """Say how the process has ended. If it still runs, it is killed now."""
        try:
            code = self._process.wait(_LAST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "it has closed its socket"
        if code == -signal.SIGKILL:
            return "it was killed, as the system does if memory is used up"
        return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"

    def _take(self, message: Any) -> None:
        if isinstance(message, Reply):
            self._soon(self._settle, message)
        elif isinstance(message, list):
            self._soon(self._deliver, message)
        elif isinstance(message, Line):
            change = self._readers.add if message.open else self._readers.discard
            change(message.reader)
        else:
            _log(message)

    def _deliver(self, message: Message) -> None:
        for item in message:
            deliver(self._answers, item)

    def _soon(self, call: Callable[..., None], message: Any) -> None:
        """Take a message on the event loop, which has ended if the replica's process is about to."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, message)

    def _settle(self, reply: Reply) -> None:
        future = self._calls.get(reply.number)
        # Whoever waited may have been cancelled.
        if future is not None and not future.done():
            future.set_result(reply)


def _log(record: logging.LogRecord) -> None:
    logging.getLogger(record.name).handle(record)
