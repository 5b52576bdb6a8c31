"""Carries the updates of all answers from a language model's replica to an ingress in one stream.

A message costs its sender and its reader about the same, whatever it holds, and a step of the engine makes an
update for each running answer. So an ingress reads one stream, a channel, of each replica; each of its
messages holds every update since the last one. An answer's own call then carries no updates: its start, its
end, its failure and its cancellation only. If the channel to its replica is not open when the first update of
an answer is ready, all of them come by its own call.

On one host a channel is a line (:mod:`deployments.ray_serve.line`). Between hosts it is a streaming call by
gRPC. That counts as a running request for Ray Serve, so it ends a moment after the last answer: a replica
without requests may be stopped.
"""

import asyncio
import contextvars
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from deployments.errors import logger
from deployments.ray_serve.packing import (
    PIECE_BYTES,
    Assembly,
    Encoded,
    PackedUpdate,
    Piece,
    PixelsInfo,
    RowsInfo,
    pack,
    pieces,
    unpack,
    weight,
)
from deployments.ray_serve.refusals import Refusal, abandoned, checked, was_cancelled
from deployments.stages import Generation, StageLost
from deployments.tracing import Carrier
from engine.errors import SightlineError
from engine.mailbox import Mailbox, Taker
from engine.outputs import StreamUpdate, merge_updates

#: Seconds for which a channel stays open without answers.
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Here:
    """First item of an answer's own call if no channel is open. Its updates follow there, unless
    :class:`Elsewhere` comes before them.

    Attributes:
        replica: id of the replica that answers.
        line: address of its line; empty if it has none.
    """

    replica: str
    line: str = ""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Item of an answer's own call, before any update, that says that its updates come by the channel.

    Without any item a call may seem to have failed. Ray Serve tells by a stream's metadata that a replica has
    accepted the call, and gRPC doesn't promise to bring that of a stream without messages.

    Attributes:
        replica: id of the replica that answers.
    """

    replica: str


@dataclass(frozen=True, slots=True)
class Sent:
    """Result of a call that has put all updates of its answer into the channel of ``replica``."""

    replica: str


@dataclass(frozen=True, slots=True)
class Addressed:
    """An item of a channel that doesn't name its request itself."""

    request_id: str
    item: Piece | Refusal | Sequence[Encoded]


#: A message of a channel.
Message = list[PackedUpdate | Addressed]

#: What an ingress says to ask for an answer by a line: the request, the span that the work belongs to, how to
#: read each array of the request's media, and these arrays.
Asked = tuple[Generation, Carrier, Sequence[RowsInfo | PixelsInfo], Sequence[np.ndarray]]


class Outbox:
    """The sending end of a channel: updates that its reader hasn't taken yet, one for each answer.

    Args:
        idle_s: seconds after which it ends if there are no answers; None if it doesn't.
    """

    def __init__(self, idle_s: float | None = IDLE_S) -> None:
        self._idle_s = idle_s
        self._updates: dict[str, StreamUpdate] = {}
        self._encoded: dict[str, Sequence[Encoded]] = {}
        self._errors: dict[str, SightlineError] = {}
        self._event = asyncio.Event()
        self._ready: Callable[[], None] = self._event.set
        self._answers = 0
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False
        self._start_timer()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Keep the channel open while an answer is given."""
        self._answers += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            yield
        finally:
            self._answers -= 1
            if not self._answers:
                self._start_timer()

    def put(self, update: StreamUpdate) -> None:
        """Send an update.

        Raises:
            StageLost: the reader has gone, or reads another channel.
        """
        if self.closed:
            raise abandoned()
        earlier = self._updates.get(update.request_id)
        if not self._updates:
            # Once for all updates of a step.
            self._ready()
        self._updates[update.request_id] = update if earlier is None else merge_updates(earlier, update)

    def tell(self, request_id: str, encoded: Sequence[Encoded]) -> None:
        """Tell, before the updates of an answer, what was encoded for it."""
        if encoded:
            self._encoded[request_id] = encoded

    def fail(self, request_id: str, error: SightlineError) -> bool:
        """Send the error that ends an answer, behind its updates; returns False if the channel is closed."""
        if not self.closed:
            self._errors[request_id] = error
            self._ready()
        return not self.closed

    def close(self) -> None:
        """End the channel after what is in it."""
        self.closed = True
        self._ready()

    def when_ready(self, call: Callable[[], None]) -> None:
        """Have ``call`` called whenever there may be something to take, and when the channel is closed: a way
        to read it that takes no task. Whoever reads by :meth:`messages` doesn't need it."""
        self._ready = call

    def take(self) -> Iterator[Message]:
        """The messages that hold all that is in the channel now."""
        encoded, self._encoded = self._encoded, {}
        updates, self._updates = self._updates, {}
        errors, self._errors = self._errors, {}
        return _messages(encoded, list(updates.values()), errors)

    @property
    def ended(self) -> bool:
        """True if the channel is closed and nothing is left in it."""
        return self.closed and not (self._updates or self._errors)

    async def messages(self) -> AsyncGenerator[Message, None]:
        """The channel's messages, to its end. Closing the iterator closes the channel."""
        try:
            while True:
                await self._event.wait()
                self._event.clear()
                for message in self.take():
                    yield message
                if self.ended:
                    return
        finally:
            self.closed = True

    def _start_timer(self) -> None:
        if self._idle_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.close)


def _messages(
    encoded: dict[str, Sequence[Encoded]],
    updates: Sequence[StreamUpdate],
    errors: dict[str, SightlineError],
) -> Iterator[Message]:
    """Messages that gRPC takes, in order."""
    message: Message = [Addressed(*each) for each in encoded.items()]
    room = PIECE_BYTES
    for update in updates:
        size = weight(update)
        if size > room and message:
            yield message
            message, room = [], PIECE_BYTES
        room -= size
        if size <= PIECE_BYTES:
            message.append(pack(update))
            continue
        for piece in pieces(update):
            assert isinstance(piece, Piece)
            yield [Addressed(update.request_id, piece)]
    message += [Addressed(name, Refusal(error)) for name, error in errors.items()]
    if message:
        yield message


class Outboxes:
    """The open channels of a replica, by the names of their readers."""

    def __init__(self) -> None:
        self._open: dict[str, Outbox] = {}

    def find(self, reader: str) -> Outbox | None:
        """The channel to ``reader``; None if none is open."""
        outbox = self._open.get(reader)
        return None if outbox is None or outbox.closed else outbox

    @contextmanager
    def open(self, reader: str, idle_s: float | None = IDLE_S) -> Iterator[Outbox]:
        """A channel, in place of one that the reader had before; ``idle_s`` as of :class:`Outbox`."""
        if (earlier := self._open.get(reader)) is not None:
            earlier.close()
        outbox = self._open[reader] = Outbox(idle_s)
        try:
            yield outbox
        finally:
            if self._open.get(reader) is outbox:
                del self._open[reader]


class Answer(Mailbox):
    """The updates of one answer at its ingress, whichever way they come.

    Attributes:
        channel: the replica by whose channel they come; empty as long as that isn't known.
        encoded: what the replica has encoded for the answer.
    """

    def __init__(self, relay: Taker | None = None) -> None:
        super().__init__(relay)
        self.channel = ""
        self.encoded: Sequence[Encoded] = ()
        self._assembly = Assembly()

    def take(self, item: Any) -> None:
        """Add an item of a stream: a packed update, a piece of one, a refusal, or what was encoded."""
        if type(item) is list:
            self.encoded = item
            return
        try:
            if type(item) is not tuple:
                item = self._assembly.add(checked(item))
            if item is not None:
                self.put(unpack(item))
        except SightlineError as error:
            # The traceback's frames would keep this object, which keeps the error.
            self.fail(error.with_traceback(None))


def deliver(answers: Mapping[str, Answer], item: PackedUpdate | Addressed) -> Answer | None:
    """Give an item of a channel to its answer, and return that; None if it is no longer read."""
    content: Any
    if isinstance(item, Addressed):
        name, content = item.request_id, item.item
    else:
        name, content = item[0], item
    if (answer := answers.get(name)) is not None:
        answer.take(content)
    return answer


class _Expected:
    """Keeps an answer among others as long as it is read."""

    __slots__ = ("_answers", "_relay", "_request_id")

    def __init__(self, answers: dict[str, Answer], request_id: str, relay: Taker | None) -> None:
        self._answers, self._request_id, self._relay = answers, request_id, relay

    def __enter__(self) -> Answer:
        answer = self._answers[self._request_id] = Answer(self._relay)
        return answer

    def __exit__(self, *_: Any) -> None:
        del self._answers[self._request_id]


class Inbox:
    """The receiving ends of channels: one for each replica of a language model.

    Args:
        open_stream: calls ``LanguageModelReplica.updates`` of the replica with the id that it is given.
        follow_line: see :func:`deployments.ray_serve.line.follow`.

    Attributes:
        name: of this reader; unique.
        lines: for each replica to which a line is open, what asks for an answer by it, or gives one up.
    """

    def __init__(
        self,
        open_stream: Callable[[str, str], AbstractAsyncContextManager[AsyncIterator[Any]]],
        follow_line: Callable[
            [str, str, Callable[[Message], None], Callable[[Callable[[Asked | str], None]], None]],
            Awaitable[bool],
        ],
    ) -> None:
        self.name = uuid.uuid4().hex
        self.lines: dict[str, Callable[[Asked | str], None]] = {}
        self._open_stream, self._follow_line = open_stream, follow_line
        self._answers: dict[str, Answer] = {}
        self._channels: dict[str, asyncio.Task[None]] = {}

    def expect(self, request_id: str, relay: Taker | None = None) -> AbstractContextManager[Answer]:
        """The answer to a request, as long as it is read.

        Args:
            relay: takes updates past the reader.
        """
        return _Expected(self._answers, request_id, relay)

    def read(self, replica: str, line: str = "") -> None:
        """Open the channel of a replica, unless it is open.

        Args:
            line: address of its line; the channel is a call if it is empty or leads nowhere.
        """
        if replica not in self._channels:
            # In a context of its own: Serve cancels calls that were made for a request when that one ends.
            context = contextvars.Context()
            self._channels[replica] = context.run(asyncio.ensure_future, self._read(replica, line))

    def comes_by(self, answer: Answer, replica: str) -> None:
        """Note that an answer comes, or has come, by a replica's channel. What of it has not come yet is lost
        with the channel."""
        answer.channel = replica
        if replica not in self._channels:
            answer.fail(abandoned())

    async def _read(self, replica: str, line: str) -> None:
        def take(message: Message) -> None:
            for item in message:
                if (answer := deliver(self._answers, item)) is not None:
                    answer.channel = replica

        try:
            opened = partial(self.lines.__setitem__, replica)
            if line and await self._follow_line(line, self.name, take, opened):
                return
            async with self._open_stream(self.name, replica) as messages:
                async for message in messages:
                    take(checked(message))
        except asyncio.CancelledError:
            # Serve raises this, too, where the replica has cancelled the call.
            if was_cancelled():
                raise
        except StageLost:
            pass
        except Exception as error:
            logger.info("the channel of a language model's replica broke: %r", error)
        finally:
            del self._channels[replica]
            self.lines.pop(replica, None)
            for answer in list(self._answers.values()):
                if answer.channel == replica:
                    answer.fail(abandoned())
