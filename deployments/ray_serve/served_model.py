"""A language model as a replica uses it: with an encoder, if it has one, and with lines to its readers."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Self

import numpy as np

from deployments.errors import logger
from deployments.metrics.families import Family
from deployments.ray_serve.channel import Outbox, Outboxes
from deployments.ray_serve.line import Lines
from deployments.ray_serve.packing import Encoded, PixelsInfo, RowsInfo
from deployments.ray_serve.refusals import abandoned
from deployments.stage_config import EncoderConfig
from deployments.stages import Generation, Pooling
from deployments.tasks import all_or_none
from deployments.tracing import TracingConfig, make_tracer
from engine.config import EngineConfig
from engine.errors import SightlineError
from engine.executor.launch import Launcher
from engine.mailbox import Relay
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.prompt import EmbeddedMedia, PreparedMedia
from engine.startup import StartTimes
from engine.turns import Turns


class ServedModel:
    """The language model stage in this process, and its lines.

    Args:
        stage: a :class:`deployments.language_model.LanguageModel`, closed with this object.
        outboxes: of the lines.
        encoder: a :class:`deployments.encoder.VisionEncoder` of this process, closed with this object;
            None if the encoder is elsewhere.
    """

    def __init__(self, stage: Any, outboxes: Outboxes, encoder: Any = None) -> None:
        self._stage, self._encoder = stage, encoder
        self._outboxes = outboxes
        self._lines = Lines(outboxes, self._give)

    @classmethod
    def load(
        cls,
        engine: EngineConfig,
        encoder: EncoderConfig | None,
        tracing: TracingConfig | None,
        outboxes: Outboxes,
        launcher: Launcher | None = None,
    ) -> Self:
        """Load the model.

        Args:
            encoder: of the encoder in this process; None if there is none.
            tracing: where spans go.
            outboxes: of the lines.
            launcher: starts the ranks beyond the first; processes of this machine if None.

        Raises:
            CheckpointError, ConfigError: it can't be loaded or run.
        """
        times = StartTimes()
        with times.phase("modules"):
            # Not above: a replica whose engine has a process of its own has no use for torch.
            from engine.placement import begin_to_open_device

            begin_to_open_device(engine)
            from deployments.encoder import VisionEncoder
            from deployments.language_model import LanguageModel

        logger.info("%s: modules were imported in %s", "language model", times)
        made = turns = None
        if encoder is not None:
            turns = Turns()
            # First: the memory that is left is for keys and values.
            made = VisionEncoder(encoder, engine, make_tracer(tracing, "encoder"), turns=turns)
        stage = LanguageModel.load(engine, make_tracer(tracing, "language-model"), launcher, turns)
        return cls(stage, outboxes, made)

    def when_dead(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, on any thread, once the engine or the encoder can compute nothing more."""
        self._stage.when_dead(call)
        if self._encoder is not None:
            self._encoder.when_dead(call)

    async def line(self) -> str:
        """Address of the lines; see :meth:`deployments.ray_serve.line.Lines.address`."""
        return await self._lines.address()

    async def answered(self) -> None:
        """Return once all answers have ended that were asked for by lines."""
        await self._lines.answered()

    def has_line(self, reader: str) -> bool:
        """Return whether a line to ``reader`` is open."""
        return self._outboxes.find(reader) is not None

    async def embedded(
        self, infos: Sequence[RowsInfo | PixelsInfo], arrays: Sequence[np.ndarray]
    ) -> tuple[list[EmbeddedMedia], list[Encoded]]:
        """Embedding rows of each item, and what was encoded for that.

        Args:
            arrays: embedding rows, or pixels to encode, for each of ``infos``.
        """
        encoded: list[Encoded] = []

        async def made(info: RowsInfo | PixelsInfo, array: np.ndarray) -> EmbeddedMedia:
            if isinstance(info, RowsInfo):
                return info.embedded(array)
            began = time.perf_counter()
            rows = await self._encoder.encode(PreparedMedia(info.item, array), info.salt, info.asked)
            encoded.append(Encoded(rows.hash, rows.cached, time.perf_counter() - began))
            return rows

        return await all_or_none(made(*each) for each in zip(infos, arrays, strict=True)), encoded

    async def answer(
        self,
        request: Generation,
        infos: Sequence[RowsInfo | PixelsInfo],
        arrays: Sequence[np.ndarray],
        reader: str,
    ) -> None:
        """Give an answer by the line to ``reader``, to its end; further arguments as of :meth:`embedded`.

        Raises:
            SightlineError: the request failed, and the reader wasn't told by its line.
        """
        if (outbox := self._outboxes.find(reader)) is None:
            raise abandoned()
        await self._give(outbox, request, infos, list(arrays))

    async def _give(
        self,
        outbox: Outbox,
        request: Generation,
        infos: Sequence[RowsInfo | PixelsInfo],
        arrays: list[np.ndarray],
    ) -> None:
        """As :meth:`answer`, into ``outbox``. The pixels among ``arrays`` are not kept."""
        media, encoded = await self.embedded(infos, arrays)
        arrays.clear()
        await give(self, outbox, request, media, encoded)

    def generate(
        self, request: Generation, media: Sequence[EmbeddedMedia], relay: Relay | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        """See :meth:`deployments.language_model.LanguageModel.generate`."""
        return self._stage.generate(request, media, relay)

    async def embed(
        self, request: Pooling, infos: Sequence[RowsInfo | PixelsInfo], arrays: Sequence[np.ndarray]
    ) -> tuple[EmbeddingOutput, list[Encoded]]:
        """Pool a prompt's hidden states into a vector; and what was encoded, as :meth:`embedded` says."""
        media, encoded = await self.embedded(infos, arrays)
        return await self._stage.embed(request, media), encoded

    async def max_model_len(self) -> int:
        """The most tokens of prompt and answer together."""
        return await self._stage.max_model_len()

    async def device(self) -> str:
        """The devices that the model runs on, in words."""
        return await self._stage.device()

    async def metrics(self) -> dict[str, Any]:
        """Counters, gauges and times of the engine."""
        return self._stage.metrics()

    async def families(self) -> list[Family]:
        """The metrics of this replica."""
        return self._stage.families()

    async def encoder_families(self) -> list[Family]:
        """The metrics of the encoder."""
        return self._encoder.families()

    async def is_idle(self) -> bool:
        """See :meth:`deployments.language_model.LanguageModel.is_idle`."""
        return self._stage.is_idle()

    async def check_health(self) -> None:
        """Check that the engine and the encoder are running.

        Raises:
            Unavailable: one has stopped.
        """
        self._stage.check_health()
        if self._encoder is not None:
            self._encoder.check_health()

    def close(self) -> None:
        """Stop the engine and the encoder. Requests that still run are lost."""
        self._stage.close()
        if self._encoder is not None:
            self._encoder.close()


async def give(
    model: Any,
    outbox: Outbox,
    request: Generation,
    media: Sequence[EmbeddedMedia],
    encoded: Sequence[Encoded],
) -> None:
    """Put the answer of ``model`` to a request into a channel, to its end.

    Args:
        encoded: what was encoded for it; see :meth:`deployments.ray_serve.channel.Outbox.tell`.

    Raises:
        SightlineError: the request failed, and the channel is closed.
    """
    relay = Relay()
    try:
        with outbox.answer():
            outbox.tell(request.request_id, encoded)
            async with aclosing(model.generate(request, media, relay)) as updates:
                await send(updates, outbox, relay)
    except SightlineError as error:
        if not outbox.fail(request.request_id, error):
            raise


async def send(updates: AsyncIterator[StreamUpdate], outbox: Outbox, relay: Relay) -> None:
    """Put an answer's updates into a channel. All but the first go there by themselves, up to the last."""
    async for update in updates:
        outbox.put(update)
        relay.to = outbox.put
