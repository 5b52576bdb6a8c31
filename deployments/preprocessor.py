"""Pictures from wherever they are to what the encoder takes. Needs CPUs only."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from deployments.handoff import PixelsRef, put
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.inputs.frontend import MediaProcessor, for_prompt, load_media_processor
from engine.inputs.messages import MediaSource
from engine.inputs.prompt import PreparedMedia
from engine.media.decode import ImageLimits, decode_image
from engine.media.fetch import MediaFetcher
from engine.media.guard import FetchPolicy


class Preprocessor:
    """A replica prepares pictures of one model, several at a time.

    Args:
        config: which model, and the options of its processor.
        fetch: which addresses are fetched from.
        images: what a picture may be.
        threads: pictures decoded at a time.
    """

    def __init__(self, config: EngineConfig, fetch: FetchPolicy, images: ImageLimits, threads: int) -> None:
        processor = load_media_processor(config)
        assert processor is not None, "models without pictures have no preprocessor"
        self._processor = processor
        self._fetcher = MediaFetcher(fetch)
        self._limits = images
        self._threads = ThreadPoolExecutor(threads, "pictures")

    async def prepare(self, sources: list[MediaSource]) -> list[PixelsRef]:
        """Fetch, decode and prepare all media of a request, in order.

        Raises:
            MediaError: naming the field of the request whose picture can't be had, decoded or shown.
        """
        data = await self._fetcher.fetch_all(sources)
        processor = for_prompt(self._processor, sources)
        tasks = [
            asyncio.ensure_future(self._prepare(processor, source, pictures))
            for source, pictures in zip(sources, data, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _prepare(
        self, processor: MediaProcessor, source: MediaSource, pictures: list[bytes]
    ) -> PixelsRef:
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, self._make, processor, source, pictures)
        return PixelsRef(prepared.item, await put(prepared.pixels))

    def _make(self, processor: MediaProcessor, source: MediaSource, pictures: list[bytes]) -> PreparedMedia:
        try:
            if source.kind == "video":
                return processor.prepare_video([self._decode(source, data) for data in pictures])
            return processor.prepare(self._decode(source, pictures[0]))
        except InvalidRequest as error:
            # Processors know of pictures, not of requests.
            error.param = source.where
            raise

    def _decode(self, source: MediaSource, data: bytes) -> Image.Image:
        return decode_image(data, self._limits, where=source.where)
