"""Hands a request's results from their maker to the task that reads them, on one event loop."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from engine.errors import SightlineError
from engine.outputs import EmbeddingOutput, StreamUpdate, merge_updates

#: A result of a request: an update of its stream, its vector, or the error that ended it.
Result = StreamUpdate | EmbeddingOutput | SightlineError


class Taker(Protocol):
    """Takes updates from a mailbox past its reader."""

    def takes(self, update: StreamUpdate) -> bool:
        """Take an update; returns False if it is for the reader.

        Raises:
            SightlineError: for the reader.
        """
        ...


class Relay:
    """Passes updates on without waking the mailbox's reader, who would only do the same. A :class:`Taker`.

    Those in the middle of a stream do: none in which a choice ends, and none while an earlier one waits.

    Attributes:
        to: takes an update, or raises a :class:`SightlineError` for the reader. None: the reader gets all.
    """

    __slots__ = ("to",)

    def __init__(self) -> None:
        self.to: Callable[[StreamUpdate], None] | None = None

    def takes(self, update: StreamUpdate) -> bool:
        """See :class:`Taker`."""
        if self.to is None or update.finished:
            return False
        for delta in update.deltas:
            if delta.finish_reason is not None:
                return False
        self.to(update)
        return True


class Mailbox:
    """Holds the updates that the reader hasn't taken yet, merged into one: a slow reader costs no memory.

    Args:
        relay: takes some past the reader.
    """

    def __init__(self, relay: Taker | None = None) -> None:
        self._relay = relay
        # An asyncio.Event, which may have many readers, takes twice as long.
        self._reader: asyncio.Future[None] | None = None
        self._waiting: StreamUpdate | EmbeddingOutput | None = None
        self._error: SightlineError | None = None

    def put(self, result: Result) -> None:
        """Add a result. An error is passed to :meth:`fail`."""
        if isinstance(result, SightlineError):
            self.fail(result)
            return
        if self._error is not None:
            # What comes behind an error would make an answer with a hole look whole.
            return
        if isinstance(result, StreamUpdate):
            if self._waiting is None and self._relay is not None:
                try:
                    if self._relay.takes(result):
                        return
                except SightlineError as error:
                    self.fail(error.with_traceback(None))
                    return
            elif isinstance(self._waiting, StreamUpdate):
                result = merge_updates(self._waiting, result)
        self._waiting = result
        self._wake()

    def fail(self, error: SightlineError) -> None:
        """Let :meth:`get` raise ``error`` after the results so far. The first error counts."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> StreamUpdate | EmbeddingOutput:
        """Wait for the next result. One task reads at a time.

        Raises:
            SightlineError: the request failed, and all results before the error were read.
        """
        while self._waiting is None and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._waiting is None:
            assert self._error is not None
            try:
                raise self._error
            finally:
                # The error's traceback holds this frame; a reference back would keep both in memory.
                self._error = None
        result, self._waiting = self._waiting, None
        return result

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
