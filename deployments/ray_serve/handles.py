"""The stages as the ingress sees them: behind handles of Ray Serve deployments."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.metrics.families import Part
from deployments.ray_serve.call_line import ReplicaLines
from deployments.ray_serve.channel import Answer, Elsewhere, Here, Inbox, Sent
from deployments.ray_serve.frames import MOST_BYTES
from deployments.ray_serve.handoff import (
    Brought,
    ObjectStore,
    PixelsRef,
    RowsRef,
    everywhere,
    is_large,
    stream,
    taken,
)
from deployments.ray_serve.line import follow
from deployments.ray_serve.packing import Encoded, PixelsInfo, RowsInfo
from deployments.ray_serve.refusals import Misrouted, Refusal, TooLong, abandoned, was_cancelled
from deployments.ray_serve.remote import Remote
from deployments.ray_serve.routing import EncoderRouter, LanguageModelRouter, limits_here, router_here
from deployments.report import current_report
from deployments.stages import (
    Generation,
    OpenFile,
    Pooling,
    RowsLost,
    StageLost,
    Stages,
    ways_to,
)
from deployments.tracing import current
from engine.errors import SightlineError
from engine.mailbox import Taker
from engine.media.source import MediaSource
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.prompt import KeptFiles, MediaItem, PreparedMedia

#: How often a stream is started until it reaches the replica that holds its embeddings.
_ROUTING_ATTEMPTS = 4

#: Seconds that a replica may take to answer with its metrics.
MEASURE_S = 2.0


class _RemoteStage(Remote):
    _measured = "measured"

    async def collect(self) -> list[Part]:
        """The metrics of each replica that answers."""
        return await everywhere(self._handle, self._measured, MEASURE_S)


class RemotePreprocessor(_RemoteStage):
    """The preprocessor stage. Pixels are in the object store, but for those of images that replicas on this
    host prepare by a line. Ray Serve doesn't count these calls, so there are none under an autoscaling.

    Attributes:
        ways: see :func:`deployments.stages.ways_to`.
    """

    name = "preprocessor"

    def __init__(self, handle: DeploymentHandle) -> None:
        super().__init__(handle)
        self.ways = ways_to("preprocessor")
        self._lines = ReplicaLines(partial(everywhere, self._handle, "line", MEASURE_S))

    async def prepare(
        self,
        sources: Sequence[MediaSource],
        files: Mapping[int, KeptFiles],
        caller: str,
        images: int | None = None,
        salt: str = "",
    ) -> list[PixelsRef]:
        if not files and _are_small(sources):
            line = self._lines.choose(limits_here(self._handle))
            args = list(sources), caller, images, salt, current.get()
            if line is not None:
                self.ways.add("line")
                # The replica may still have what is too long in its cache.
                with suppress(TooLong):
                    found = await line.call(*args)
                    self._ended()
                    return [_brought(media) for media in found]
        self.ways.add("call")
        args = list(sources), caller, images, salt, current.get(), *_referenced(files)
        return await self._work(self._handle.prepare.remote(*args))

    async def open(
        self, sources: Sequence[MediaSource], files: Mapping[int, KeptFiles], caller: str, images: int
    ) -> list[OpenFile]:
        args = list(sources), caller, images, current.get(), *_referenced(files)
        return await self._work(self._handle.open.remote(*args))

    async def prepare_pages(
        self, file: OpenFile, pages: Sequence[MediaSource], images: int, salt: str = ""
    ) -> list[PixelsRef]:
        self.ways.add("call")
        args = list(pages), images, salt, current.get(), replace(file.file, files=None), file.file.files
        return await self._work(self._handle.prepare_pages.remote(*args))


def _brought(media: PreparedMedia) -> PixelsRef:
    pixels = Brought(media.pixels)
    return PixelsRef(media.item, pixels, media.seconds, media.frames, media.rows, None, media.note)


def _are_small(sources: Sequence[MediaSource]) -> bool:
    """Return whether sources are images that fit a line as they are sent, and that no later request names."""
    images = all(
        source.kind == "image" and not (source.frames or source.pages or source.rows or source.uuid)
        for source in sources
    )
    return images and sum(len(source.url or "") for source in sources) <= MOST_BYTES


def _referenced(files: Mapping[int, KeptFiles]) -> list[Any]:
    """Kept files without their bytes, then the reference to those of each: Ray resolves only arguments."""
    kept = [(index, replace(entry, files=None)) for index, entry in files.items()]
    return [kept, *(entry.files for entry in files.values())]


class _Passing(_RemoteStage):
    """A stage that gives arrays to its calls.

    Args:
        store: takes large arrays that go on by a call.
    """

    def __init__(self, handle: DeploymentHandle, store: ObjectStore | None) -> None:
        super().__init__(handle)
        self._store = store or ObjectStore()

    async def _put(self, references: list[Any]) -> None:
        """Put large arrays among ``references`` into the store, and their references in their places.

        Raises:
            SightlineError: the store has no room.
        """
        try:
            for index, each in enumerate(references):
                references[index] = await self._store.passed(each)
        except Exception as error:
            raise self._reported(error) from error


class RemoteEncoder(_Passing):
    """The encoder stage in replicas of its own. Embedding rows are in the object store, but for those of
    images that have come by a line, and that replicas on this host encode by a line.

    Args:
        go_on: returns whether rows that have come by a line may go on by one.
        store: takes large arrays that go on by a call.

    Attributes:
        ways: see :func:`deployments.stages.ways_to`.
    """

    name = "encoder"

    def __init__(
        self, handle: DeploymentHandle, go_on: Callable[[], bool], store: ObjectStore | None = None
    ) -> None:
        super().__init__(handle, store)
        self.ways = ways_to("encoder")
        self._go_on = go_on
        # Of an embedding row; 0 until an answer has told it.
        self._row_bytes = 0
        self._lines = ReplicaLines(partial(everywhere, self._handle, "line", MEASURE_S))

    async def encode(self, pixels: PixelsRef, salt: str, asked: float) -> RowsRef:
        array = pixels.pixels
        router = router_here(self._handle, EncoderRouter)
        if router is not None and isinstance(array, Brought) and array.nbytes <= MOST_BYTES:
            lines = self._lines.to(limits_here(self._handle))
            lines = lines if self._fits(pixels.item) else {}
            with router.by_line(pixels.item, salt, lines) as replica:
                if replica is not None:
                    self.ways.add("line")
                    call = lines[replica].call(pixels.item, array.take(), salt, asked, current.get())
                    info, rows = await call
                    self._ended()
                    return RowsRef(info, rows)
        self.ways.add("call")
        given = [taken(array)]
        await self._put(given)
        call = self._work(self._handle.encode.remote(pixels.item, *given, salt, asked, current.get()))
        # Else this process would keep what came by a line for as long as the call lasts.
        given.clear()
        found = await call
        self._row_bytes = found.info.row_bytes or self._row_bytes
        return found

    def _fits(self, item: MediaItem) -> bool:
        """Return whether an item's rows may come by a line. Those of an image may take many times the bytes
        of its pixels, and this process keeps them for as long as the answer lasts."""
        return 0 < self._row_bytes * item.num_tokens <= MOST_BYTES and self._go_on()


class LaterEncoder(_RemoteStage):
    """The encoder stage in the replicas of the language model, which encode when they get the prompt."""

    name = "encoder"
    _measured = "encoder_measured"

    async def encode(self, pixels: PixelsRef, salt: str, asked: float) -> RowsRef:
        return RowsRef(PixelsInfo(pixels.item, salt, asked), pixels.pixels)


class _HandedOver(SightlineError):
    """A replica keeps the request until it is asked for the answer.

    Attributes:
        replica: its id.
    """

    def __init__(self, replica: str) -> None:
        super().__init__("The request is kept.")
        self.replica = replica


@contextmanager
def _running(call: Coroutine[Any, Any, None]) -> Iterator[asyncio.Task[None]]:
    """Run a call of a replica. An exception, also one that closes a generator, cancels the call there."""
    task = asyncio.create_task(call)
    try:
        yield task
    finally:
        task.cancel()


#: Has a replica work on an answer while a block runs. It gives the call that does, None if there is none.
_Way = Callable[[Answer], AbstractContextManager[asyncio.Task[None] | None]]


def _calling(call: Callable[[Answer], Coroutine[Any, Any, None]]) -> _Way:
    return lambda answer: _running(call(answer))


class RemoteLanguageModel(_Passing):
    """The language model stage.

    Args:
        store: takes large arrays that go on by a call.

    Attributes:
        ways: see :func:`deployments.stages.ways_to`.
    """

    name = "language model"

    def __init__(self, handle: DeploymentHandle, store: ObjectStore | None = None) -> None:
        super().__init__(handle, store)
        self.ways = ways_to("language_model")
        self._inbox = Inbox(
            lambda reader, name: stream(self._handle, "updates", reader, name, replica=name), follow
        )

    def has_lines(self) -> bool:
        """Return whether there is a line to each replica."""
        router = router_here(self._handle, LanguageModelRouter)
        return router is not None and bool(router.with_lines(self._inbox.lines))

    async def max_model_len(self) -> int:
        # Past the queue: replicas that have much to do are well. They differ while an update is under way.
        answers = await everywhere(self._handle, "max_model_len", MEASURE_S)
        found = [each for each in answers if not isinstance(each, Refusal)]
        return min(found) if found else await self._result(self._handle.max_model_len.remote())

    async def device(self) -> str:
        return await self._result(self._handle.device.remote())

    async def generate(
        self, request: Generation, media: Sequence[RowsRef], relay: Taker | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        # What has a replica work on the answer.
        way = await self._way(request, media)
        misrouted = 0
        while True:
            try:
                with self._inbox.expect(request.request_id, relay) as answer, way(answer) as call:
                    finished = False
                    while not finished:
                        update = await answer.get()
                        assert isinstance(update, StreamUpdate)
                        finished = update.finished
                        if answer.encoded:
                            _note(answer.encoded)
                            answer.encoded = ()
                        yield update
                    if call is not None:
                        # All updates have arrived; it has ended, or is about to.
                        await call
                return
            except _HandedOver as handed:
                way = _calling(partial(self._follow, request.request_id, handed.replica))
            except Misrouted:
                # Always the first item of a stream, so starting again cannot repeat output.
                misrouted += 1
                if misrouted == _ROUTING_ATTEMPTS:
                    raise
            except StageLost as error:
                if _any_brought(media):
                    raise RowsLost(error.message) from error
                raise

    async def _way(self, request: Generation, media: Sequence[RowsRef]) -> _Way:
        """Choose how a request's arrays reach a replica that works on the answer.

        Raises:
            StageLost: some of ``media`` are lost with the process that made them.
        """
        infos, references = _arrays(media)
        large = is_large(request)
        router = None if large or not self._inbox.lines else router_here(self._handle, LanguageModelRouter)
        arrays = None if router is None else await self._fetched(references)
        if router is not None and arrays is not None:
            replica = router.by_line(request.inputs, self._inbox.lines)
            if replica is not None:
                self.ways.add("line")
                return partial(self._asking, router, replica, request, infos, arrays)
        self.ways.add("call")
        if media or large:
            return _calling(partial(self._hand_over, request, infos, references))
        return _calling(partial(self._follow, request, ""))

    async def _fetched(self, references: Sequence[Any]) -> list[np.ndarray] | None:
        """The arrays of a request's media; None if they are too large for a line. Errors as :meth:`_way`."""
        try:
            arrays = [each if isinstance(each, np.ndarray) else await each for each in references]
        except RayError as error:
            raise self._reported(error) from error
        return arrays if sum(array.nbytes for array in arrays) <= MOST_BYTES else None

    @contextmanager
    def _asking(
        self,
        router: LanguageModelRouter,
        replica: str,
        request: Generation,
        infos: Sequence[RowsInfo | PixelsInfo],
        arrays: list[np.ndarray],
        answer: Answer,
    ) -> Iterator[None]:
        """Ask a replica for an answer by its line. An exception within the block, also one that closes a
        generator, gives the answer up."""
        say = self._inbox.lines[replica]
        router.asked[replica] += 1
        # From now on the answer is lost with the line.
        answer.channel = replica
        try:
            say((request, current.get(), infos, arrays))
            # They are on their way: see `Brought`.
            arrays.clear()
            yield
            self._ended()
        except BaseException:
            if self._inbox.lines.get(replica) is say:
                with suppress(StageLost):
                    say(request.request_id)
            raise
        finally:
            router.asked[replica] -= 1

    async def _hand_over(
        self,
        request: Generation,
        infos: Sequence[RowsInfo | PixelsInfo],
        references: list[Any],
        answer: Answer,
    ) -> None:
        """Bring a request to a replica, which answers at once if it has a channel to this process. That has
        the ``references`` then: see :class:`~deployments.ray_serve.handoff.Brought`."""
        method = self._handle.hold
        try:
            await self._put(references)
            call = self._result(method.remote(request, current.get(), self._inbox.name, infos, *references))
            references.clear()
            result = await call
            if isinstance(result, Sent):
                self._ended()
                self._inbox.comes_by(answer, result.replica)
            else:
                replica, encoded = result
                _note(encoded)
                answer.fail(_HandedOver(replica))
        except SightlineError as error:
            answer.fail(error)
        except Exception as error:
            # The call could not even be made.
            answer.fail(self._reported(error))

    async def _follow(self, given: Generation | str, replica: str, answer: Answer) -> None:
        """Call the replica, and pass on what the call brings."""
        by_channel = False
        args = given, current.get(), self._inbox.name
        try:
            async with stream(self._handle, "generate", *args, replica=replica) as items:
                async for item in items:
                    if isinstance(item, Here):
                        self._inbox.read(item.replica, item.line)
                    elif isinstance(item, Elsewhere):
                        by_channel = True
                        self._inbox.comes_by(answer, item.replica)
                    else:
                        answer.take(item)
            self._ended()
            if not by_channel:
                # Nothing more comes: if the reader still waits, the answer has broken off.
                answer.fail(abandoned())
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            answer.fail(abandoned())
        except Exception as error:
            answer.fail(self._reported(error))

    async def embed(self, request: Pooling, media: Sequence[RowsRef]) -> EmbeddingOutput:
        infos, references = _arrays(media)
        try:
            await self._put(references)
            call = self._work(self._handle.embed.remote(request, current.get(), infos, *references))
            references.clear()
            output, encoded = await call
        except StageLost as error:
            if _any_brought(media):
                raise RowsLost(error.message) from error
            raise
        _note(encoded)
        return output


def _arrays(media: Sequence[RowsRef]) -> tuple[list[RowsInfo | PixelsInfo], list[Any]]:
    """Descriptions of the arrays, and references to them. Each is to be an argument of its own: Ray resolves
    no others. Errors as of :func:`~deployments.ray_serve.handoff.taken`."""
    return [ref.info for ref in media], [taken(ref.array) for ref in media]


def _any_brought(media: Sequence[RowsRef]) -> bool:
    """Return whether some of ``media`` came by a line: a stage that is lost loses them, too."""
    return any(isinstance(ref.array, Brought) for ref in media)


def _note(encoded: Sequence[Encoded]) -> None:
    """Report what the replica has encoded for the request."""
    report = current_report()
    for each in encoded:
        report.encoded(each.hash, each.cached, each.seconds)


def remote_stages(
    language_model: DeploymentHandle,
    preprocessor: DeploymentHandle | None = None,
    encoder: DeploymentHandle | None = None,
) -> Stages:
    """The stages of one model behind the handles of its deployments.

    Args:
        encoder: a handle of the language model's deployment if its replicas encode.
    """
    generating = RemoteLanguageModel(language_model)
    encoding: RemoteEncoder | LaterEncoder | None = None
    if encoder is not None:
        together = _deployment(encoder) == _deployment(language_model)
        encoding = LaterEncoder(encoder) if together else RemoteEncoder(encoder, generating.has_lines)
    preparing = None if preprocessor is None else RemotePreprocessor(preprocessor)
    asked = preparing, encoding, generating
    ways = [each.ways for each in asked if each is not None and not isinstance(each, LaterEncoder)]
    return Stages(generating, preparing, encoding, ways)


def _deployment(handle: DeploymentHandle) -> tuple[str, str]:
    return handle.app_name, handle.deployment_name
