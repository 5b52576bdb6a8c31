"""The preprocessor stage: gets images and makes the pixels that the encoder takes. Needs CPUs only."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from deployments.metrics.families import Family, Part
from deployments.metrics.stage import StageMeter
from deployments.tasks import all_or_none
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.frontend import MediaProcessor, fetch_policy, for_prompt, load_media_processor
from engine.media.decode import ImageLimits, check_total, decode_image, read_size
from engine.media.fetch import MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource
from engine.metrics import COUNT_BUCKETS, Histogram
from engine.prompt import PreparedMedia

T = TypeVar("T")


class Preprocessor:
    """Prepares the images and videos of one model, several at a time.

    Args:
        config: the model, and the options of its processor.
        fetch: the addresses that images may be fetched from.
        images: limits on an image's format and size.
        threads: images decoded at a time.
    """

    def __init__(self, config: EngineConfig, fetch: FetchPolicy, images: ImageLimits, threads: int) -> None:
        processor = load_media_processor(config)
        assert processor is not None, "a text-only model has no preprocessor"
        self._processor = processor
        self._fetcher = MediaFetcher(fetch_policy(config, fetch))
        self._limits = images
        self._max_tokens = config.max_model_len
        self._threads = ThreadPoolExecutor(threads, "images")
        self._on_threads = 0
        self._pixels = self._pending_pixels = 0
        self._items = Histogram(COUNT_BUCKETS)
        self._meter = StageMeter(lambda: max(self._on_threads - threads, 0), self._items.snapshot)

    async def prepare(self, sources: Sequence[MediaSource]) -> list[PreparedMedia]:
        """Fetch, decode and prepare all media of a request, in order.

        Raises:
            MediaError: an image can't be fetched, decoded or shown; ``param`` is its ``where``.
            ContextLengthExceeded: the images alone need more tokens than the model's context has.
        """
        with self._meter.request():
            began = time.perf_counter()
            data = await self._fetcher.fetch_all(sources)
            fetched = time.perf_counter()
            received = sum(len(image) for images in data for image in images)
            processor = for_prompt(self._processor, sources)
            pixels = await self._on_thread(self._check, processor, sources, data)

            async def make(source: MediaSource, images: list[bytes]) -> PreparedMedia:
                made = await self._on_thread(self._make, processor, source, images)
                seconds = {"fetch": fetched - began, "prepare": time.perf_counter() - fetched}
                return replace(made, seconds=seconds)

            self._items.observe(len(sources))
            self._pending_pixels += pixels
            try:
                prepared = await all_or_none(
                    make(source, images) for source, images in zip(sources, data, strict=True)
                )
            finally:
                self._pending_pixels -= pixels
            self._pixels += pixels
            self._meter.count_bytes(received, sum(media.pixels.nbytes for media in prepared))
            return prepared

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
        ]

    async def close(self) -> None:
        """Close the connections of the running event loop, and end the threads."""
        await self._fetcher.close()
        self._threads.shutdown(wait=False)

    async def _on_thread(self, work: Callable[..., T], *args: Any) -> T:
        self._on_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        finally:
            self._on_threads -= 1

    def _check(
        self, processor: MediaProcessor, sources: Sequence[MediaSource], data: list[list[bytes]]
    ) -> int:
        """Read the images' headers; refuse those that need too much memory or too many tokens. Return the
        pixels of all images and frames."""
        sizes: list[tuple[int, int]] = []
        tokens = 0
        for source, images in zip(sources, data, strict=True):
            measured = [read_size(image, self._limits, where=source.where) for image in images]
            sizes += measured
            if source.kind == "image":
                tokens += _name_source(source, processor.check, measured[0])
        check_total(sizes, self._limits)
        if self._max_tokens is not None and tokens >= self._max_tokens:
            raise ContextLengthExceeded.by(self._max_tokens, tokens, 1)
        return sum(width * height for width, height in sizes)

    def _make(self, processor: MediaProcessor, source: MediaSource, images: list[bytes]) -> PreparedMedia:
        decoded = [decode_image(data, self._limits, where=source.where) for data in images]
        if source.kind == "video":
            return _name_source(source, processor.prepare_video, decoded)
        return _name_source(source, processor.prepare, decoded[0])


def _name_source(source: MediaSource, work: Callable[[Any], T], argument: Any) -> T:
    """Call a processor. Its errors get the ``where`` of ``source``, which the processor doesn't know."""
    try:
        return work(argument)
    except InvalidRequest as error:
        error.param = source.where
        raise
