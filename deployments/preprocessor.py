"""Pictures from wherever they are to what the encoder takes. Needs CPUs only."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from deployments.handoff import PixelsRef, put
from deployments.threads import take_turns
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.frontend import MediaProcessor, fetch_policy, for_prompt, load_media_processor
from engine.media.decode import ImageLimits, check_total, decode_image, read_size
from engine.media.fetch import MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource
from engine.prompt import PreparedMedia

T = TypeVar("T")


class Preprocessor:
    """A replica prepares pictures of one model, several at a time.

    Args:
        config: which model, and the options of its processor.
        fetch: which addresses are fetched from.
        images: what a picture may be.
        threads: pictures decoded at a time.
    """

    def __init__(self, config: EngineConfig, fetch: FetchPolicy, images: ImageLimits, threads: int) -> None:
        take_turns()
        processor = load_media_processor(config)
        assert processor is not None, "models without pictures have no preprocessor"
        self._processor = processor
        self._fetcher = MediaFetcher(fetch_policy(config, fetch))
        self._limits = images
        self._max_tokens = config.max_model_len
        self._threads = ThreadPoolExecutor(threads, "pictures")

    async def prepare(self, sources: list[MediaSource]) -> list[PixelsRef]:
        """Fetch, decode and prepare all media of a request, in order.

        Raises:
            MediaError: naming the field of the request whose picture can't be had, decoded or shown.
        """
        data = await self._fetcher.fetch_all(sources)
        processor = for_prompt(self._processor, sources)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._check, processor, sources, data)
        tasks = [
            asyncio.ensure_future(self._prepare(processor, source, pictures))
            for source, pictures in zip(sources, data, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _check(self, processor: MediaProcessor, sources: list[MediaSource], data: list[list[bytes]]) -> None:
        """Refuse by their headers what would take too much memory, or more tokens than the model has."""
        sizes: list[tuple[int, int]] = []
        tokens = 0
        for source, pictures in zip(sources, data, strict=True):
            measured = [read_size(picture, self._limits, where=source.where) for picture in pictures]
            sizes += measured
            if source.kind == "image":
                tokens += self._blamed(source, processor.check, measured[0])
        check_total(sizes, self._limits)
        if self._max_tokens is not None and tokens >= self._max_tokens:
            raise ContextLengthExceeded(
                f"The request's pictures take {tokens} tokens, but this model's context holds "
                f"{self._max_tokens} in all: use smaller or fewer pictures.",
                param="messages",
            )

    async def _prepare(
        self, processor: MediaProcessor, source: MediaSource, pictures: list[bytes]
    ) -> PixelsRef:
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, self._make, processor, source, pictures)
        return PixelsRef(prepared.item, await put(prepared.pixels))

    def _make(self, processor: MediaProcessor, source: MediaSource, pictures: list[bytes]) -> PreparedMedia:
        decoded = [self._decode(source, data) for data in pictures]
        if source.kind == "video":
            return self._blamed(source, processor.prepare_video, decoded)
        return self._blamed(source, processor.prepare, decoded[0])

    def _blamed(self, source: MediaSource, work: Callable[[Any], T], argument: Any) -> T:
        """Call a processor; its errors get the field of the request, which it doesn't know of."""
        try:
            return work(argument)
        except InvalidRequest as error:
            error.param = source.where
            raise

    def _decode(self, source: MediaSource, data: bytes) -> Image.Image:
        return decode_image(data, self._limits, where=source.where)
