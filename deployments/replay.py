"""Carries requests on whose stage has died, elsewhere or once it is back."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from deployments.config import ReplayConfig
from deployments.stages import Generation, LanguageModelStage, Rows, RowsLost, StageLost
from engine.errors import Unavailable
from engine.outputs import StreamUpdate
from engine.progress import Progress

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

#: Seconds before the second try. Each further one waits twice as long, up to the last number: a process that
#: has died may still be listed for a moment.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class Patience:
    """What one request can bear: how many losses, and how long a wait for a stage that is lost.

    Args:
        config: the limits.
        on_loss: called for each loss after which the request goes on.
    """

    def __init__(self, config: ReplayConfig, on_loss: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._on_loss = on_loss
        self._losses = 0
        self._until: float | None = None

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``, which is started again whenever its stage is lost.

        Raises:
            Unavailable: that happened too often, or the stage does not come back.
        """
        while True:
            try:
                return await self.wait(work())
            except StageLost as loss:
                await self.bear(loss)

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of ``work``. After a loss, the wait for the first result is limited.

        Raises:
            Unavailable: the stage does not come back.
        """
        if self._until is None:
            return await work
        try:
            async with asyncio.timeout_at(self._until) as limit:
                result = await work
        except TimeoutError:
            if limit.expired():
                raise self._given_up() from None
            raise
        self._until = None
        return result

    async def bear(self, loss: StageLost) -> None:
        """Pause before another try.

        Raises:
            StageLost: ``loss``; it was one too many.
            Unavailable: the stage did not come back in time.
        """
        self._losses += 1
        if self._losses > self._config.max_losses:
            raise loss
        logger.warning("a request is carried on after it lost a part of the server: %s", loss)
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._config.patience_s
        elif now >= self._until:
            raise self._given_up() from loss
        self._on_loss()
        await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** (self._losses - 1), _LONGEST_PAUSE_S))

    def _given_up(self) -> Unavailable:
        return Unavailable(
            "A part of the server stopped while it worked on this request, and was not back within "
            f"{self._config.patience_s:g} seconds; try again later."
        )


async def carried_on(
    stage: LanguageModelStage,
    request: Generation,
    media: Sequence[Rows],
    encode_again: Callable[[], Awaitable[Sequence[Rows]]],
    patience: Patience,
) -> AsyncGenerator[StreamUpdate, None]:
    """Stream an answer to its end, whatever replicas die meanwhile. Closing the iterator aborts it.

    Args:
        request: with a seed, unless it is greedy: the rest of an answer must follow from its beginning.
        media: the embedding rows.
        encode_again: makes them again if they are lost.

    Raises:
        SightlineError: the request is refused, or could not be carried on.
    """
    progress = Progress()
    for tries in itertools.count():
        name = attempt_name(request.request_id, tries)
        again = replace(request, request_id=name, progress=progress if tries else None)
        try:
            async with aclosing(stage.generate(again, media)) as updates:
                while (update := await patience.wait(anext(updates, None))) is not None:
                    progress.take(update)
                    update.request_id = request.request_id
                    yield update
            return
        except StageLost as loss:
            if progress.finished(request.params.n):
                return
            await patience.bear(loss)
            if isinstance(loss, RowsLost):
                media = await encode_again()


def attempt_name(request_id: str, tries: int) -> str:
    """The id of a request's further try: a replica that is only out of reach may still work on the last."""
    return f"{request_id}.{tries}" if tries else request_id
