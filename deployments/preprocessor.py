"""The preprocessor stage: gets images and makes the pixels that the encoder takes. Needs CPUs only."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from deployments.metrics.families import Family, Part
from deployments.metrics.snapshots import prepared_families
from deployments.metrics.stage import StageMeter
from deployments.stage_config import PreprocessorConfig
from deployments.stages import OpenFile
from deployments.tasks import all_or_none
from deployments.tracing import Tracer
from engine.config import EngineConfig
from engine.families.given_rows import GivenRows
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.fetch import MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.keys import kept_files
from engine.media.ledger import Account, Ledger, MediaLimits
from engine.media.safetensors import base64_size
from engine.media.source import MediaSource
from engine.media.video.limits import VideoLimits
from engine.metrics import COUNT_BUCKETS, Histogram
from engine.model_parts import fetch_policy, load_embedding_width, load_media_processor
from engine.preparation import MediaPreparation
from engine.prepared_items import PreparedItems
from engine.prompt import KeptFiles, PreparedMedia

T = TypeVar("T")


class Preprocessor:
    """Prepares the images and videos of one model, several at a time.

    Args:
        config: of the stage.
        engine: the model, and the options of its processor.
        fetch: the addresses that media may be fetched from.
        images: limits on an image's format and size.
        videos: limits on videos.
        documents: limits on documents.
        media: the most that the media of requests in preparation may take.
        tracer: makes the spans of requests.
    """

    def __init__(
        self,
        config: PreprocessorConfig,
        engine: EngineConfig,
        fetch: FetchPolicy,
        images: ImageLimits,
        videos: VideoLimits,
        documents: DocumentLimits = DocumentLimits(),
        media: MediaLimits = MediaLimits(),
        tracer: Tracer | None = None,
    ) -> None:
        processor = load_media_processor(engine)
        assert processor is not None, "a text-only model has no preprocessor"
        self._preparation = MediaPreparation(
            processor,
            images,
            videos,
            documents,
            max_tokens=engine.max_model_len,
            processes=config.video_processes,
            readers=config.document_processes,
            threads=config.threads,
            rows=GivenRows(load_embedding_width(engine), fetch.max_bytes),
        )
        self._items = PreparedItems(self._preparation, config.cache_bytes)
        self._fetcher = MediaFetcher(fetch_policy(engine, fetch))
        self.ledger = Ledger(media)
        self._threads = ThreadPoolExecutor(config.threads, "images")
        self._num_threads = config.threads
        # Videos and documents take seconds: images don't queue behind them.
        self._slow_threads = {
            "video": ThreadPoolExecutor(config.video_processes, "videos"),
            "document": ThreadPoolExecutor(config.document_processes, "documents"),
        }
        self._on_threads = 0
        self._pixels = self._pending_pixels = 0
        self._counts = Histogram(COUNT_BUCKETS)
        self._meter = StageMeter(
            "preprocessor",
            lambda: max(self._on_threads - self._num_threads, 0),
            self._counts.snapshot,
            tracer,
        )

    def take_over(self, config: PreprocessorConfig) -> None:
        """Take over the values of :attr:`PreprocessorConfig.IN_PLACE`, for the next images."""
        self._items.limit(config.cache_bytes)
        if config.threads != self._num_threads:
            former, self._threads = self._threads, ThreadPoolExecutor(config.threads, "images")
            self._num_threads = config.threads
            self._preparation.limit_threads(config.threads)
            # It ends once what was given to it is done.
            former.shutdown(wait=False)

    async def prepare(
        self,
        sources: Sequence[MediaSource],
        files: Mapping[int, KeptFiles] = {},
        caller: str = "",
        images: int | None = None,
        salt: str = "",
    ) -> list[PreparedMedia]:
        """Fetch, decode and prepare media of a request, in order.

        Args:
            files: files of earlier requests, by the index of the source that names them.
            caller: name of the caller's API key.
            images: number of images of the whole request; that of ``sources`` if None.
            salt: keeps the caches of tenants apart.

        Raises:
            MediaError: an item can't be fetched, decoded or shown; ``param`` is its ``where``.
            ContextLengthExceeded: the media alone need more tokens than the model's context has.
        """
        with self._meter.request() as span, self.ledger.open(caller) as account:
            began = time.perf_counter()
            preparation = self._preparation
            processor = preparation.for_prompt(sources, images)
            data = await self._bytes(partial(preparation.decode_rows, processor), sources, files, account)
            fetched = time.perf_counter()
            received = sum(len(file) for files in data for file in files)
            pixels = await self._on_thread(preparation.check, processor, sources, data)
            if sources:
                account.charge("pixels", pixels, sources[0].where)

            async def make(source: MediaSource, files: list[bytes]) -> PreparedMedia:
                work = partial(self._items.prepare, processor, source, files, account, salt)
                kind = "video" if source.is_video_file else "image"
                made = await self._on_thread(_kept, work, source, files, kind=kind)
                seconds = {"fetch": fetched - began, "prepare": time.perf_counter() - fetched}
                return replace(made, seconds=seconds)

            self._counts.observe(len(sources))
            self._pending_pixels += pixels
            try:
                prepared = await all_or_none(
                    make(source, files) for source, files in zip(sources, data, strict=True)
                )
            finally:
                self._pending_pixels -= pixels
            self._pixels += pixels
            span.note(items=len(sources), bytes=received, pixels=pixels)
            self._meter.count_bytes(received, sum(media.pixels.nbytes for media in prepared))
            return prepared

    async def open(
        self, sources: Sequence[MediaSource], files: Mapping[int, KeptFiles], caller: str, images: int
    ) -> list[OpenFile]:
        """Fetch and open documents, and image files of which several frames are shown.

        Args:
            files, caller: as of :meth:`prepare`.
            images: number of the request's other images.

        Raises:
            MediaError: a file can't be fetched or read; ``param`` is its ``where``.
            ContextLengthExceeded: the pages alone need more tokens than the model's context has.
        """
        with self._meter.request() as span, self.ledger.open(caller) as account:
            preparation = self._preparation
            processor = preparation.for_prompt(sources)
            data = await self._bytes(partial(preparation.decode_rows, processor), sources, files, account)
            opened = await all_or_none(
                self._on_thread(preparation.open, source, *file, kind=source.kind)
                for source, file in zip(sources, data, strict=True)
            )
            pages = [page for file in opened for page in file.sources]
            processor = preparation.for_prompt(pages, images + len(pages))
            pixels = await self._on_thread(preparation.check_pages, processor, pages)
            account.charge("pixels", pixels, sources[0].where)
            received = sum(len(file) for files in data for file in files)
            span.note(items=len(pages), bytes=received, pixels=pixels)
            self._meter.count_bytes(received, 0)
            kept = [await self._on_thread(kept_files, file) for file in data]
            return [OpenFile(*pair) for pair in zip(opened, kept, strict=True)]

    async def prepare_pages(
        self, file: OpenFile, pages: Sequence[MediaSource], images: int, salt: str = ""
    ) -> list[PreparedMedia]:
        """Render and prepare pages of an opened file, in order; errors as :meth:`prepare`.

        Args:
            images: number of images of the whole request.
            salt: as of :meth:`prepare`.
        """
        with self._meter.request() as span:
            began = time.perf_counter()
            processor = self._preparation.for_prompt(pages, images)
            found = [page.page for page in pages if page.page is not None]
            pixels = sum(page.size[0] * page.size[1] for page in found)
            kind = "image" if found[0].dpi is None else "document"
            self._pending_pixels += pixels
            try:
                work = self._items.prepare_pages, processor, pages, file.file, salt
                made = await self._on_thread(*work, kind=kind)
            finally:
                self._pending_pixels -= pixels
            self._counts.observe(len(pages))
            self._pixels += pixels
            span.note(items=len(pages), pixels=pixels)
            self._meter.count_bytes(0, sum(media.pixels.nbytes for media in made))
            seconds = {"prepare": (time.perf_counter() - began) / len(made)}
            return [replace(media, seconds=seconds) for media in made]

    async def _bytes(
        self,
        decode_rows: Callable[[MediaSource], bytes],
        sources: Sequence[MediaSource],
        kept: Mapping[int, KeptFiles],
        account: Account,
    ) -> list[list[bytes]]:
        """The files of each source: kept, fetched, or with embedding rows. Their bytes are charged."""
        found = {index: list(entry.files) for index, entry in kept.items()}
        for source in sources:
            account.charge("frames", len(source.frames), source.where)
            if source.index in kept:
                account.charge("bytes", kept[source.index].size, source.where)
        brought = [source for source in sources if source.index not in found]
        for source in brought:
            if source.rows is not None:
                account.charge("bytes", base64_size(source.rows.payload), source.where)
                found[source.index] = [await self._on_thread(decode_rows, source)]
        wanted = [source for source in brought if source.rows is None]
        for source, fetched in zip(wanted, await self._fetcher.fetch_all(wanted, account), strict=True):
            found[source.index] = fetched
        return [found[source.index] for source in sources]

    async def collect(self) -> list[Part]:
        """The metrics of this stage."""
        return [Part({"replica": "local"}, self.families())]

    def families(self) -> list[Family]:
        """The metrics of this replica."""
        return [
            *self._meter.families(),
            Family.of(
                "sightline_preprocessor_pixels_total",
                "counter",
                "Pixels of the images and frames that were prepared, as they were sent.",
                self._pixels,
            ),
            Family.of(
                "sightline_preprocessor_pending_pixels",
                "gauge",
                "Pixels of the images and frames that wait or are being prepared.",
                self._pending_pixels,
            ),
            *prepared_families(self._items.metrics()),
        ]

    @property
    def pending_pixels(self) -> int:
        """Pixels of the images and frames that wait or are being prepared."""
        return self._pending_pixels

    async def close(self) -> None:
        """Close the connections of the running event loop, and end the threads and processes."""
        await self._fetcher.close()
        self._threads.shutdown(wait=False)
        for threads in self._slow_threads.values():
            threads.shutdown(wait=False)
        await asyncio.to_thread(self._preparation.close)

    async def _on_thread(self, work: Callable[..., T], *args: Any, kind: str = "image") -> T:
        threads = self._slow_threads.get(kind, self._threads)
        self._on_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work, *args)
        finally:
            self._on_threads -= 1


def _kept(prepare: Callable[[], PreparedMedia], source: MediaSource, files: Sequence[bytes]) -> PreparedMedia:
    """Prepare an item, with its files if later requests may name it."""
    made = prepare()
    return replace(made, kept=kept_files(files)) if source.uuid else made
