"""Calls of replicas on this host by Unix sockets, past Ray Serve.

A call of Ray Serve whose result has arrays costs its caller several milliseconds of CPU time: router, actor
call, acceptance, references, and the store's processes. A message of a few hundred kilobytes takes a tenth.
"""

import asyncio
import contextvars
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

from deployments.errors import as_sightline, logger
from deployments.ray_serve.frames import LineEnd, LineServer, ServedLine, connected, framed
from deployments.ray_serve.refusals import Refusal, TooLong, abandoned, checked, was_cancelled

#: Seconds before replicas without a line are asked for one again: at first, and at most.
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class CallLines(LineServer):
    """A replica's end of its callers' lines.

    Args:
        answer: does what a call asks for.
    """

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        super().__init__(partial(_Answerer, answer), "all calls go by Ray Serve")


class _Answerer(ServedLine):
    """The replica's end of one line.

    A message is a call's number and its arguments, or the number alone of a call that is given up. An answer
    is the number and the result, which may be a :class:`~deployments.ray_serve.refusals.Refusal`.
    """

    def __init__(self, answer: Callable[..., Awaitable[Any]], connections: set[ServedLine]) -> None:
        super().__init__(connections)
        self._answer = answer

    def _take(self, message: Any) -> None:
        if isinstance(message, int):
            self._give_up(message)
        else:
            number, args = message
            self._begin(number, self._run(number, args))

    async def _run(self, number: int, args: tuple[Any, ...]) -> None:
        try:
            data = framed((number, await self._answer(*args)))
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            # Something else was: the caller must not wait.
            data = framed((number, Refusal(abandoned())))
        except OverflowError as error:
            data = framed((number, Refusal(TooLong(str(error)))))
        except Exception as error:
            data = framed((number, Refusal(as_sightline(error))))
        self._transport.writelines(data)


class CallLine(LineEnd):
    """The caller's end of one line.

    Args:
        on_end: called when the connection has ended.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._on_end = on_end
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ended = False

    @property
    def busy(self) -> int:
        """Calls that wait for their answers."""
        return len(self._calls)

    async def call(self, *args: Any) -> Any:
        """The result of a call. Cancelling it gives the call up.

        Raises:
            SightlineError: the replica's.
            TooLong: the result takes 2 GiB or more.
            StageLost: the line ended.
        """
        if self._ended:
            raise abandoned()
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.writelines(framed((number, args)))
            # They may hold an image's pixels.
            del args
            return checked(await future)
        except asyncio.CancelledError:
            if not self._ended:
                self._transport.writelines(framed(number))
            raise
        finally:
            del self._calls[number]

    def _take(self, message: Any) -> None:
        self._settle(*message)

    def _settle(self, number: int, result: Any) -> None:
        future = self._calls.get(number)
        # Whoever waited may have been cancelled.
        if future is not None and not future.done():
            future.set_result(result)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._on_end()
        for number in list(self._calls):
            self._settle(number, Refusal(abandoned()))


class ReplicaLines:
    """A caller's lines to the replicas of a deployment, by their names.

    Args:
        addresses: asks all replicas for their names and the addresses of their :class:`CallLines`.
    """

    def __init__(self, addresses: Callable[[], Awaitable[list[tuple[str, str]]]]) -> None:
        self._addresses = addresses
        self._lines: dict[str, CallLine] = {}
        self._opening: asyncio.Future[None] | None = None
        self._not_before, self._pause_s = 0.0, _PAUSE_S

    def choose(self, limits: Mapping[str, int]) -> CallLine | None:
        """The line to the less busy of two random replicas. None if Ray Serve is to choose: a replica has no
        line yet, or as many calls as it may have.

        Args:
            limits: the most calls of each replica, by its name.
        """
        lines = self.to(limits)
        names = random.sample(list(limits), min(2, len(limits))) if lines else []
        name = min(names, key=lambda each: lines[each].busy, default=None)
        return lines[name] if name is not None and lines[name].busy < limits[name] else None

    def to(self, names: Iterable[str]) -> Mapping[str, CallLine]:
        """The lines by the names of their replicas; none if one of ``names`` has no line yet."""
        if all(name in self._lines for name in names):
            return self._lines
        self._open_soon()
        return {}

    def _open_soon(self) -> None:
        now = asyncio.get_running_loop().time()
        if (self._opening is None or self._opening.done()) and now >= self._not_before:
            # In a context of its own: Serve cancels calls that were made for a request when that one ends.
            self._opening = contextvars.Context().run(asyncio.ensure_future, self._open(now))

    async def _open(self, now: float) -> None:
        opened = False
        try:
            for name, address in await self._addresses():
                if name in self._lines or not address:
                    continue
                line = await connected(address, partial(CallLine, partial(self._lost, name)))
                if line is not None:
                    self._lines[name], opened = line, True
        except Exception:
            logger.exception("lines to replicas can't be opened")
        # A replica on another host has none for this process.
        self._pause_s = _PAUSE_S if opened else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._not_before = now + self._pause_s

    def _lost(self, name: str) -> None:
        self._lines.pop(name, None)
        self._not_before, self._pause_s = 0.0, _PAUSE_S
