"""The stages as Ray Serve replicas: each class holds a stage and passes its arrays through the object store.

Deliberate errors are returned as :class:`~deployments.ray_serve.refusals.Refusal`, not raised.

The process that builds the application, and the preprocessor's, import this module too: what needs torch is
imported where a replica with a model starts.
"""

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from ray import serve

from deployments.errors import logger
from deployments.in_place import InPlace
from deployments.metrics.families import Family, Part
from deployments.preprocessor import Preprocessor
from deployments.ray_serve.call_line import CallLines
from deployments.ray_serve.channel import Elsewhere, Here, Message, Outboxes, Sent
from deployments.ray_serve.engine_process import EngineProcess
from deployments.ray_serve.handoff import ObjectStore, PixelsRef, RowsRef
from deployments.ray_serve.held_requests import Held, HeldRequests
from deployments.ray_serve.packing import Encoded, PackedUpdate, Piece, PixelsInfo, RowsInfo, pieces
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.refusals import Misrouted, Refusal, answered
from deployments.ray_serve.served_model import ServedModel, give, send
from deployments.stage_config import EncoderConfig, LanguageModelConfig, PreprocessorConfig
from deployments.stages import Generation, OpenFile, Pooling
from deployments.tasks import all_or_none
from deployments.tracing import Carrier, TracingConfig, current, make_tracer
from engine.config import EngineConfig
from engine.errors import SightlineError
from engine.executor.launch import Launcher
from engine.mailbox import Relay
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.guard import FetchPolicy
from engine.media.ledger import MediaLimits
from engine.media.source import MediaSource
from engine.media.video.limits import VideoLimits
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.preparation import PagedFile
from engine.prompt import KeptFiles, MediaItem, PreparedMedia
from engine.startup import StartTimes

#: The part of Ray Serve's time for a check of health that an engine's process has. A check may begin late. A
#: process that hangs would outlive the replica, which must kill it before Ray Serve kills the replica.
_PATIENCE = 0.7


def leave() -> None:
    """End this process at once: its engine has died, and others can carry its requests on.

    Callers see the connection break and routers the process end, both sooner than a health check would.
    """
    logger.critical("this replica leaves, because its engine has died")
    logging.shutdown()
    os._exit(1)


class PreprocessorReplica:
    """Arguments as :class:`~deployments.preprocessor.Preprocessor`, after ``tracing``."""

    def __init__(
        self,
        tracing: TracingConfig | None,
        config: PreprocessorConfig,
        engine: EngineConfig,
        fetch: FetchPolicy,
        images: ImageLimits,
        videos: VideoLimits,
        documents: DocumentLimits,
        media: MediaLimits,
    ) -> None:
        prepare_process()
        tracer = make_tracer(tracing, "preprocessor")
        self._stage = Preprocessor(config, engine, fetch, images, videos, documents, media, tracer)
        self._in_place = InPlace(config, config.IN_PLACE, self._stage.take_over)
        self._store = ObjectStore()
        self._lines = CallLines(self._prepare_near)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take over values while the replica runs; Ray Serve calls this."""
        self._in_place.take_over(user_config)

    async def check_health(self) -> None:
        """Answer on the event loop that does the work: Ray Serve's own answer comes from another one."""

    async def line(self) -> tuple[str, str]:
        """This replica's name, and the address by which processes of its host call :meth:`prepare`; empty if
        they can't."""
        return serve.get_replica_context().replica_id.unique_id, await self._lines.address()

    async def _prepare_near(
        self, sources: Sequence[MediaSource], caller: str, images: int | None, salt: str, span: Carrier
    ) -> list[PreparedMedia] | Refusal:
        """As :meth:`prepare`, with the pixels themselves."""
        current.set(span)
        return await answered(self._stage.prepare(sources, {}, caller, images, salt))

    async def prepare(
        self,
        sources: Sequence[MediaSource],
        caller: str,
        images: int | None,
        salt: str,
        span: Carrier,
        kept: Sequence[tuple[int, KeptFiles]],
        *files: Any,
    ) -> list[PixelsRef] | Refusal:
        """Prepare media of a request, in order.

        Args:
            caller: name of the caller's API key.
            images: number of images of the whole request; that of ``sources`` if None.
            salt: keeps the caches of tenants apart.
            kept: files of earlier requests, each with the index of the source that names it.
            files: the bytes of each of ``kept``; Ray has resolved their references.
        """
        current.set(span)
        work = self._stage.prepare(sources, _given(kept, files), caller, images, salt)
        return await answered(self._all(work))

    async def open(
        self,
        sources: Sequence[MediaSource],
        caller: str,
        images: int,
        span: Carrier,
        kept: Sequence[tuple[int, KeptFiles]],
        *files: Any,
    ) -> list[OpenFile] | Refusal:
        """Fetch and open files whose pages are shown; arguments as of :meth:`prepare`."""
        current.set(span)
        return await answered(self._open(sources, _given(kept, files), caller, images))

    async def prepare_pages(
        self, pages: Sequence[MediaSource], images: int, salt: str, span: Carrier, file: KeptFiles, data: Any
    ) -> list[PixelsRef] | Refusal:
        """Render and prepare pages of a file; Ray has resolved the reference to its bytes."""
        current.set(span)
        opened = OpenFile(PagedFile(tuple(pages)), replace(file, files=data))
        return await answered(self._all(self._stage.prepare_pages(opened, pages, images, salt)))

    async def _open(
        self, sources: Sequence[MediaSource], files: Mapping[int, KeptFiles], caller: str, images: int
    ) -> list[OpenFile]:
        opened = await self._stage.open(sources, files, caller, images)
        kept = await all_or_none(self._kept(each.file) for each in opened)
        return [replace(each, file=file) for each, file in zip(opened, kept, strict=True)]

    async def _all(self, work: Awaitable[list[PreparedMedia]]) -> list[PixelsRef]:
        return await all_or_none(self._stored(media) for media in await work)

    async def _stored(self, media: PreparedMedia) -> PixelsRef:
        kept, pixels = media.kept, await self._store.put(media.pixels)
        if kept is not None:
            kept = await self._kept(kept)
        return PixelsRef(media.item, pixels, media.seconds, media.frames, media.rows, kept, media.note)

    async def _kept(self, kept: KeptFiles) -> KeptFiles:
        return replace(kept, files=await self._store.put(kept.files))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Signals of :mod:`deployments.autoscaling`."""
        return {"megapixels": self._stage.pending_pixels / 1e6}

    async def measured(self) -> Part:
        """The metrics of this replica."""
        return _named(self._stage.families())

    async def __del__(self) -> None:
        if hasattr(self, "_lines"):
            # Ray Serve has waited for its own calls alone.
            await self._lines.answered()


class VisionEncoderReplica:
    """Arguments as :class:`~deployments.encoder.VisionEncoder`, after ``tracing``."""

    def __init__(self, tracing: TracingConfig | None, config: EncoderConfig, engine: EngineConfig) -> None:
        times = StartTimes()
        with times.phase("modules"):
            from engine.placement import begin_to_open_device

            begin_to_open_device(engine)
            from deployments.encoder import VisionEncoder

        prepare_process()
        logger.info("%s: modules were imported in %s", "encoder", times)
        self._stage = VisionEncoder(config, engine, make_tracer(tracing, "encoder"))
        self._in_place = InPlace(config, config.IN_PLACE, self._stage.take_over)
        self._store = ObjectStore()
        self._lines = CallLines(self._encode_near)
        self._stage.when_dead(leave)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take over values while the replica runs; Ray Serve calls this."""
        self._in_place.take_over(user_config)

    async def line(self) -> tuple[str, str]:
        """As that of :class:`PreprocessorReplica`, for calls of :meth:`encode`."""
        return serve.get_replica_context().replica_id.unique_id, await self._lines.address()

    async def _encode_near(
        self, item: MediaItem, pixels: np.ndarray, salt: str, asked: float, span: Carrier
    ) -> tuple[RowsInfo, np.ndarray] | Refusal:
        """As :meth:`encode`, with the rows themselves."""
        current.set(span)
        return await answered(self._rows(PreparedMedia(item, pixels), salt, asked))

    async def encode(
        self, item: MediaItem, pixels: np.ndarray, salt: str, asked: float, span: Carrier
    ) -> RowsRef | Refusal:
        """Encode one item; Ray has resolved the reference to ``pixels``."""
        current.set(span)
        return await answered(self._encode(PreparedMedia(item, pixels), salt, asked))

    async def _encode(self, pixels: PreparedMedia, salt: str, asked: float) -> RowsRef:
        info, rows = await self._rows(pixels, salt, asked)
        return RowsRef(info, await self._store.put(rows))

    async def _rows(self, pixels: PreparedMedia, salt: str, asked: float) -> tuple[RowsInfo, np.ndarray]:
        embedded = await self._stage.encode(pixels, salt, asked)
        return RowsInfo.of(embedded), embedded.rows

    async def metrics(self) -> dict[str, Any]:
        """Counters of the encoder."""
        return self._stage.metrics()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Signals of :mod:`deployments.autoscaling`."""
        return {"visual_tokens": float(self._stage.metrics()["pending_rows"])}

    async def measured(self) -> Part:
        """The metrics of this replica."""
        return _named(self._stage.families())

    async def check_health(self) -> None:
        """Ray Serve restarts a replica that raises here."""
        self._stage.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_lines"):
            # Ray Serve has waited for its own calls alone.
            await self._lines.answered()
        if hasattr(self, "_stage"):
            self._stage.close()


class LanguageModelReplica:
    """Holds one engine, and the model's encoder if that has no replicas of its own.

    Args:
        tracing: where spans go.
        config: of the stage.
        engine: the model and how to run it.
        encoder: of the encoder that this replica has; None if it has none.
        launcher: starts the ranks beyond the first; processes of this machine if None.
    """

    def __init__(
        self,
        tracing: TracingConfig | None,
        config: LanguageModelConfig,
        engine: EngineConfig,
        encoder: EncoderConfig | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._in_place = InPlace(config, config.IN_PLACE, lambda _: None)
        self._held = HeldRequests()
        self._outboxes = Outboxes()
        prepare_process()
        self._stage: EngineProcess | ServedModel
        if config.engine_process and launcher is None:
            patience_s = _PATIENCE * config.health_check_timeout_s
            self._stage = EngineProcess.start(engine, encoder, tracing, leave, patience_s)
        else:
            self._stage = ServedModel.load(engine, encoder, tracing, self._outboxes, launcher)
            self._stage.when_dead(leave)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Log that nothing of this stage can change while a replica runs; Ray Serve calls this."""
        self._in_place.take_over(user_config)

    async def hold(
        self,
        request: Generation,
        span: Carrier,
        reader: str,
        infos: Sequence[RowsInfo | PixelsInfo],
        *arrays: np.ndarray,
    ) -> Sent | tuple[str, list[Encoded]] | Refusal:
        """Take a request and its embeddings. If the channel to ``reader`` is open, the answer goes there to
        its end; else the request is kept until :meth:`generate` takes it.

        Args:
            arrays: embedding rows, or pixels to encode, for each of ``infos``; Ray has resolved their
                references.

        Returns:
            That the answer has ended; or this replica's id, the session to call :meth:`generate` with, and
            what was encoded.
        """
        current.set(span)
        return await answered(self._hold(request, reader, infos, arrays))

    async def _hold(
        self,
        request: Generation,
        reader: str,
        infos: Sequence[RowsInfo | PixelsInfo],
        arrays: Sequence[np.ndarray],
    ) -> Sent | tuple[str, list[Encoded]]:
        if self._stage.has_line(reader):
            await self._stage.answer(request, infos, arrays, reader)
            return Sent(self._name())
        media, encoded = await self._stage.embedded(infos, arrays)
        outbox = self._outboxes.find(reader)
        if outbox is None:
            self._held.keep(Held(request, media))
            return self._name(), encoded
        await give(self._stage, outbox, request, media, encoded)
        return Sent(self._name())

    async def updates(self, reader: str, replica: str) -> AsyncIterator[Message | Refusal]:
        """Open the channel to ``reader``, and stream the updates of its answers; see
        :mod:`deployments.ray_serve.channel`.

        Args:
            replica: id of the replica that is meant. Another one answers with a
                :class:`~deployments.ray_serve.refusals.Misrouted` refusal.
        """
        if replica != self._name():
            yield Refusal(Misrouted("This replica has gone."))
            return
        # A channel may end without a message; see `Elsewhere`.
        yield []
        with self._outboxes.open(reader) as outbox:
            async with aclosing(outbox.messages()) as messages:
                async for message in messages:
                    yield message

    async def generate(
        self, given: Generation | str, span: Carrier, reader: str
    ) -> AsyncIterator[PackedUpdate | Piece | Here | Elsewhere | Refusal]:
        """Stream a request's output: by the channel to ``reader``, or here if none is open when the first
        update is ready.

        Args:
            given: the request, or the id of one that was handed over. If this replica doesn't have it, the
                first item is a :class:`~deployments.ray_serve.refusals.Misrouted` refusal.
        """
        current.set(span)
        outbox = None
        try:
            held = self._held.take(given) if isinstance(given, str) else Held(given, [])
            if self._stage.has_line(reader):
                yield Elsewhere(self._name())
                infos = [RowsInfo.of(each) for each in held.media]
                await self._stage.answer(held.request, infos, [each.rows for each in held.media], reader)
                return
            outbox = self._outboxes.find(reader)
            relay = Relay()
            async with aclosing(self._stage.generate(held.request, held.media, relay)) as updates:
                update: StreamUpdate | None = None
                if outbox is None:
                    yield Here(self._name(), await self._stage.line())
                    # The reader opens its channel meanwhile, as a rule in less time than the prompt takes.
                    update = await anext(updates, None)
                    outbox = self._outboxes.find(reader)
                if outbox is None:
                    while update is not None:
                        for item in pieces(update):
                            yield item
                        update = await anext(updates, None)
                else:
                    with outbox.answer():
                        yield Elsewhere(self._name())
                        if update is not None:
                            outbox.put(update)
                        await send(updates, outbox, relay)
        except SightlineError as error:
            if outbox is None or not outbox.fail(held.request.request_id, error):
                yield Refusal(error)

    async def embed(
        self,
        request: Pooling,
        span: Carrier,
        infos: Sequence[RowsInfo | PixelsInfo],
        *arrays: np.ndarray,
    ) -> tuple[EmbeddingOutput, list[Encoded]] | Refusal:
        """Pool a prompt's hidden states into a vector; ``infos`` and ``arrays`` as in :meth:`hold`."""
        current.set(span)
        return await answered(self._stage.embed(request, infos, arrays))

    @staticmethod
    def _name() -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def max_model_len(self) -> int | Refusal:
        """The most tokens of prompt and answer together."""
        return await self._stage.max_model_len()

    async def device(self) -> str:
        """The devices that the model runs on, in words."""
        return await self._stage.device()

    async def metrics(self) -> dict[str, Any]:
        """Counters, gauges and times of the engine."""
        return await self._stage.metrics()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Signals of :mod:`deployments.autoscaling`."""
        return await self.record_routing_stats()

    async def measured(self) -> Part:
        """The metrics of this replica."""
        return _named(await self._stage.families())

    async def encoder_measured(self) -> Part:
        """The metrics of this replica's encoder."""
        return _named(await self._stage.encoder_families())

    async def record_routing_stats(self) -> dict[str, float]:
        """Facts about this replica that the routers of its deployment need; Ray Serve brings it to them."""
        found = await self._stage.metrics()
        usage = found["kv_blocks_used"] / max(found["kv_blocks_total"], 1)
        return {"waiting_tokens": found["waiting_tokens"], "kv_usage": usage}

    async def is_idle(self) -> bool:
        """Return whether this replica holds no data of any request.

        Raises:
            AssertionError: an idle engine still holds memory.
        """
        return await self._stage.is_idle() and not len(self._held)

    async def check_health(self) -> None:
        """Ray Serve restarts a replica that raises here."""
        await self._stage.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_stage"):
            # Ray Serve has waited for its own calls alone. It ends this process when the time for that is up.
            with suppress(SightlineError):
                await self._stage.answered()
            self._stage.close()


def _named(families: list[Family]) -> Part:
    return Part({"replica": serve.get_replica_context().replica_id.unique_id}, families)


def _given(kept: Sequence[tuple[int, KeptFiles]], files: Sequence[Any]) -> dict[int, KeptFiles]:
    return {index: replace(entry, files=held) for (index, entry), held in zip(kept, files, strict=True)}
