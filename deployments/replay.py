"""Carries requests on whose stage has died, elsewhere or once it is back."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import TypeVar

from deployments.caller_fields import caller_fields
from deployments.config import ReplayConfig
from deployments.errors import release
from deployments.metrics.ingress import arrival
from deployments.stages import Generation, LanguageModelStage, Rows, RowsLost, StageLost
from engine.errors import Overloaded, SightlineError, Unavailable
from engine.mailbox import Taker
from engine.outputs import StreamUpdate
from engine.progress import Progress

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

#: Seconds of the longest pause before another try.
_LONGEST_PAUSE_S = 2.0


class DeadlineExceeded(SightlineError):
    """A request took longer than it may."""

    status = 504
    code = "deadline_exceeded"


def deadline(timeout_s: float | None) -> float | None:
    """When the time of the current HTTP request is up, by the event loop's clock; None for no limit.

    Args:
        timeout_s: seconds from its arrival, or from now if this is no work for one.
    """
    if timeout_s is None:
        return None
    now = time.perf_counter()
    return asyncio.get_running_loop().time() + timeout_s - (now - (arrival.get() or now))


class Patience:
    """Limits of one request: losses, seconds of waiting for a lost stage, and seconds in all.

    Args:
        config: the limits.
        deadline: when the request must have ended, by the event loop's clock; None for no limit.
        on_loss: called for each loss after which the request goes on.
    """

    def __init__(
        self,
        config: ReplayConfig,
        deadline: float | None = None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._deadline = deadline
        self._on_loss = on_loss
        self._losses = 0
        self._pause_s = config.pause_s
        self._until: float | None = None

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``, which is started again whenever its stage is lost.

        Raises:
            Unavailable: that happened too often, or the stage does not come back.
            DeadlineExceeded: the request's time is up.
        """
        while True:
            try:
                return await self.wait(work())
            except (StageLost, Overloaded) as error:
                await self.bear(error)

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of ``work``. After a loss, the wait for the first result is limited.

        Raises:
            Unavailable: the stage does not come back.
            DeadlineExceeded: the request's time is up.
        """
        limits = [limit for limit in (self._until, self._deadline) if limit is not None]
        if not limits:
            return await work
        first = min(limits)
        try:
            async with asyncio.timeout_at(first) as limit:
                result = await work
        except TimeoutError:
            if limit.expired():
                # uvloop's timers may be half a millisecond early: the clock can't say which limit it was.
                raise self._given_up(first) from None
            raise
        self._until = None
        return result

    def within(self, updates: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """``updates``, each as by :meth:`wait`. Must be closed itself.

        Raises:
            Unavailable: the stage does not come back.
            DeadlineExceeded: the request's time is up.
        """
        if self._until is None and self._deadline is None:
            # Nothing is lost and nothing limits the request, so each wait would only cost time.
            return updates
        return self._waited_for(updates)

    async def _waited_for(self, updates: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        async with aclosing(updates):
            while (update := await self.wait(anext(updates, None))) is not None:
                yield update

    async def bear(self, error: StageLost | Overloaded) -> None:
        """Pause before another try.

        A full queue is borne after a loss only: then the request had been let in, and all wait for a restart.

        Raises:
            StageLost, Overloaded: ``error``; it was one too many.
            Unavailable: the stage did not come back in time.
            DeadlineExceeded: the request's time is up.
        """
        if isinstance(error, StageLost):
            self._losses += 1
        if self._losses > self._config.max_losses or not self._losses:
            try:
                raise error
            finally:
                # Its traceback keeps this frame, and the frames that know the request's media.
                del error
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._config.patience_s
        elif now >= self._until:
            raise self._given_up(now) from error
        # The next try may take long, and must not keep what this one was given.
        release(error)
        pause_s = min(self._pause_s, _LONGEST_PAUSE_S)
        self._pause_s = 2 * pause_s
        await asyncio.sleep(pause_s)
        # Not before: where a client leaves, Ray Serve cancels the calls of its request first, and the request
        # itself a moment later. Then nothing is lost.
        if isinstance(error, StageLost):
            logger.warning("a request is carried on after it lost a part of the server: %s", error)
            self._on_loss()

    def _given_up(self, now: float) -> SightlineError:
        if self._deadline is not None and now >= self._deadline:
            return DeadlineExceeded(
                "The request took longer than this server allows; ask for less at a time."
            )
        return Unavailable(
            "A part of the server stopped while it worked on this request, and was not back within "
            f"{self._config.patience_s:g} seconds; try again later."
        )


def _unmeasured() -> AbstractContextManager[Callable[[StreamUpdate], None]]:
    return nullcontext(lambda update: None)


class _Noted:
    """A :class:`~engine.mailbox.Taker` that notes what another one takes."""

    __slots__ = ("_measure", "_progress", "_relay")

    def __init__(self, relay: Taker, progress: Progress, measure: Callable[[StreamUpdate], None]) -> None:
        self._relay, self._progress, self._measure = relay, progress, measure

    def takes(self, update: StreamUpdate) -> bool:
        if not self._relay.takes(update):
            return False
        self._progress.take(update)
        self._measure(update)
        return True


async def carried_on(
    stage: LanguageModelStage,
    request: Generation,
    media: Sequence[Rows],
    encode_again: Callable[[], Awaitable[Sequence[Rows]]],
    patience: Patience,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    measured: Callable[[], AbstractContextManager[Callable[[StreamUpdate], None]]] = _unmeasured,
    names: Mapping[str, str] = {},
    relay: Taker | None = None,
) -> AsyncGenerator[StreamUpdate, None]:
    """Stream an answer to its end, whatever replicas die meanwhile. Closing the iterator aborts it.

    Args:
        request: with a seed, unless it is greedy: the rest of an answer must follow from its beginning.
        media: the embedding rows.
        encode_again: makes them again if they are lost.
        around: makes a context around each try.
        measured: makes a context around all tries, which gives a function that is called with each update.
        names: the caller's fields by the engine's names, for errors.
        relay: takes updates of the first try past this iterator.

    Raises:
        SightlineError: the request is refused, or could not be carried on.
    """
    progress = Progress()
    with caller_fields(names), measured() as measure:
        noted = None if relay is None else _Noted(relay, progress, measure)
        for tries in itertools.count():
            again = request
            if tries:
                name = attempt_name(request.request_id, tries)
                again, noted = replace(request, request_id=name, progress=progress), None
            try:
                with around():
                    async with aclosing(patience.within(stage.generate(again, media, noted))) as updates:
                        async for update in updates:
                            if tries:
                                update.request_id = request.request_id
                                if progress.num_tokens:
                                    # The client has had its first token.
                                    update.times = None
                            progress.take(update)
                            measure(update)
                            yield update
                    if progress.finished(request.params.n):
                        return
                    raise StageLost("An answer broke off; try again shortly.")
            except (StageLost, Overloaded) as error:
                if progress.finished(request.params.n):
                    return
                await patience.bear(error)
                if isinstance(error, RowsLost):
                    media = await encode_again()


def attempt_name(request_id: str, tries: int) -> str:
    """The id of a request's further try: a replica that is only out of reach may still work on the last."""
    return f"{request_id}.{tries}" if tries else request_id
