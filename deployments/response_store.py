"""Keeps responses of the Responses API for a while, for all replicas of the ingress."""

import asyncio
import logging
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.errors import SightlineError

Json = dict[str, Any]

logger = logging.getLogger("ray.serve")

#: Seconds after which the maker of a response in the background says again that it lives, and seconds without
#: a word from it after which it has died.
WATCH_S, DEAD_S = 10.0, 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Everything from which a response can be made again.

    Attributes:
        body: the body of its request.
        earlier: how many of the conversation's messages are those of an earlier response.
        seed: of the sampling.
    """

    body: Any
    earlier: int
    seed: int | None


@dataclass(slots=True)
class StoredResponse:
    """A response that is kept.

    Attributes:
        response: the object as clients get it.
        input_items: the request's input, as items.
        messages: the whole conversation up to the response's end, as chat messages.
        owner: name of the key that may see the response.
        asked: set if the response is streamed in the background.
        is_lost: whoever made it in the background has died. Not kept.
    """

    response: Json
    input_items: list[Json]
    messages: list[Json]
    owner: str = ""
    asked: Asked | None = None
    is_lost: bool = False

    @property
    def id(self) -> str:
        return self.response["id"]


@dataclass(frozen=True, slots=True)
class Found:
    """Stored state of a response.

    Attributes:
        data: the pickled response.
        cancelled: it was cancelled.
        silent_s: seconds since whoever makes it last said that it lives, by :meth:`Keeper.stopped`; 0 while
            such a call waits.
    """

    data: bytes
    cancelled: bool = False
    silent_s: float = 0.0


class Keeper(Protocol):
    """The place where pickled responses lie: :class:`KeptResponses`, here or in another process.

    Each method may raise a SightlineError if that process is lost.
    """

    async def put(self, name: str, owner: str, data: bytes) -> None:
        """Keep a new response."""

    async def update(self, name: str, data: bytes) -> None:
        """Replace a response, unless it was deleted or dropped meanwhile."""

    async def get(self, name: str, owner: str) -> Found | None:
        """The response of that id; None if it is not kept, or is another's."""

    async def delete(self, name: str, owner: str) -> bool:
        """Forget a response, and stop it if it still runs. False if there is none."""

    async def cancel(self, name: str, owner: str) -> None:
        """Mark a response as cancelled, and stop it."""

    async def stopped(self, name: str) -> bool | None:
        """Say that a response is still made, and wait until it is cancelled or deleted: False if it is not,
        after :data:`WATCH_S`; None at once if it is not kept."""


@dataclass(slots=True)
class _Kept:
    owner: str
    data: bytes
    at: float
    watched: float
    watchers: int = 0
    cancelled: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class KeptResponses:
    """A :class:`Keeper` in memory. The oldest responses are dropped.

    Args:
        limit: the most responses.
        max_bytes: the most bytes of all responses.
        seconds: how long a response is kept after it was last replaced.
        clock: gives seconds.
    """

    def __init__(
        self, limit: int, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._max_bytes, self._seconds, self._clock = limit, max_bytes, seconds, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def put(self, name: str, owner: str, data: bytes) -> None:
        self._drop(name)
        self._kept[name] = _Kept(owner, data, self._clock(), self._clock())
        self.num_bytes += len(data)
        self._tidy()

    async def update(self, name: str, data: bytes) -> None:
        kept = self._kept.get(name)
        if kept is None:
            return
        self.num_bytes += len(data) - len(kept.data)
        kept.data, kept.at = data, self._clock()
        # The order is that of the times.
        self._kept.move_to_end(name)
        self._tidy()

    async def get(self, name: str, owner: str) -> Found | None:
        kept = self._of(name, owner)
        if kept is None:
            return None
        # This process itself may have stood still: a call that waits is a sign of life, however old it is.
        silent_s = 0.0 if kept.watchers else self._clock() - kept.watched
        return Found(kept.data, kept.cancelled, silent_s)

    async def delete(self, name: str, owner: str) -> bool:
        kept = self._of(name, owner)
        if kept is None:
            return False
        kept.stop.set()
        self._drop(name)
        return True

    async def cancel(self, name: str, owner: str) -> None:
        kept = self._of(name, owner)
        if kept is not None:
            kept.cancelled = True
            kept.stop.set()

    async def stopped(self, name: str) -> bool | None:
        kept = self._kept.get(name)
        if kept is None:
            return None
        kept.watchers += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await kept.stop.wait()
        finally:
            kept.watchers -= 1
            kept.watched = self._clock()
        return kept.stop.is_set()

    async def check_health(self) -> None:
        """Answer on the event loop that does the work: Ray Serve's own answer comes from another one."""

    def _of(self, name: str, owner: str) -> _Kept | None:
        self._tidy()
        kept = self._kept.get(name)
        return kept if kept is not None and kept.owner == owner else None

    def _tidy(self) -> None:
        """Drop what is too old or too much."""
        oldest = self._clock() - self._seconds
        while self._kept:
            name, kept = next(iter(self._kept.items()))
            fits = len(self._kept) <= self._limit and self.num_bytes <= self._max_bytes
            if fits and kept.at >= oldest:
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self.num_bytes -= len(kept.data)


class ResponseStore:
    """Responses by their ids.

    Args:
        keeper: where they lie. If it is lost and restarted, it is empty.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def put(self, stored: StoredResponse) -> None:
        """Keep a new response. If that fails, the answer is worth more than its copy: this only logs it."""
        try:
            await self._keeper.put(stored.id, stored.owner, pickle.dumps(stored))
        except SightlineError as error:
            logger.warning("the response %s is not kept: %s", stored.id, error)

    async def update(self, stored: StoredResponse) -> None:
        """Replace a response unless it was deleted meanwhile; errors as :meth:`put`."""
        try:
            await self._keeper.update(stored.id, pickle.dumps(stored))
        except SightlineError as error:
            logger.warning("the response %s is not kept: %s", stored.id, error)

    async def get(self, name: str, owner: str) -> StoredResponse | None:
        """A copy of the response of that id; None if it is not kept, or belongs to another key.

        Raises:
            SightlineError: the keeper is lost.
        """
        found = await self._keeper.get(name, owner)
        if found is None:
            return None
        stored: StoredResponse = pickle.loads(found.data)
        if found.cancelled:
            stored.response["status"] = "cancelled"
        stored.is_lost = (
            stored.response["status"] == "in_progress"
            and stored.response["background"]
            and found.silent_s > DEAD_S
        )
        return stored

    async def delete(self, name: str, owner: str) -> bool:
        """Forget a response, and stop it if it still runs; False if there is none. Errors as :meth:`get`."""
        return await self._keeper.delete(name, owner)

    async def cancel(self, name: str, owner: str) -> None:
        """Stop a response that runs in the background, in whatever replica; errors as :meth:`get`."""
        await self._keeper.cancel(name, owner)

    async def unless_stopped(self, name: str, work: asyncio.Task[None]) -> None:
        """Wait for ``work``, which makes a response; cancel it if the response is cancelled or deleted."""
        stop = asyncio.ensure_future(self._stopped(name))
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and not stop.result():
                # The keeper has dropped the response.
                await asyncio.wait({work})
        finally:
            stop.cancel()
            work.cancel()
            await asyncio.wait({work, stop})

    async def _stopped(self, name: str) -> bool:
        """Wait until a response is cancelled or deleted; False if it is not kept: nobody can do that then."""
        while True:
            try:
                stopped = await self._keeper.stopped(name)
            except Exception as error:
                # The keeper is lost, and may come back. No other error of it is a reason to stop the work.
                if not isinstance(error, SightlineError):
                    logger.exception("whether the response %s is cancelled can't be learnt", name)
                await asyncio.sleep(WATCH_S)
                continue
            if stopped is not False:
                return stopped is True
