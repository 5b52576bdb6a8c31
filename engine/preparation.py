"""Prepares the media of prompts: from encoded bytes or decoded images to the encoder's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from engine.errors import ContextLengthExceeded, InvalidRequest, MediaTooLarge
from engine.families.base import (
    AdjustableProcessor,
    MediaProcessor,
    NamelessProcessor,
    PromptAwareProcessor,
    VideoProcessor,
)
from engine.families.given_rows import GivenRows
from engine.media.crew import Crew
from engine.media.decode import ImageLimits, check_image_size, check_total, decode, read_size
from engine.media.documents.limits import DocumentLimits
from engine.media.documents.pages import Page
from engine.media.documents.reader import DocumentReader
from engine.media.frames import count_frames, decode_frames, frame_sizes
from engine.media.ledger import Account
from engine.media.source import MediaSource, num_images
from engine.media.video.decoder import OpenVideo, VideoDecoder
from engine.media.video.limits import VideoLimits
from engine.media.video.video import Pace, Video, VideoOptions
from engine.prompt import PreparedMedia

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PagedFile:
    """An opened file whose pages, or frames, are shown.

    Attributes:
        sources: one for each page, in order; none of them is rendered yet.
        texts: the text of each page; empty if the caller doesn't ask for it.
    """

    sources: tuple[MediaSource, ...]
    texts: tuple[str, ...] = ()


class MediaPreparation:
    """Decodes and prepares the media of one model. Thread-safe.

    Args:
        processor: of the model.
        images: limits on an image's format and size.
        videos: limits on videos.
        documents: limits on documents, and on images with several frames.
        max_tokens: the model's context; None if it isn't known.
        processes: videos decoded at a time.
        readers: documents read at a time.
        threads: that may compute at a time, see :class:`engine.media.crew.Crew`.
        rows: checks embedding rows in place of images; None refuses them.
    """

    def __init__(
        self,
        processor: MediaProcessor,
        images: ImageLimits | None = None,
        videos: VideoLimits | None = None,
        documents: DocumentLimits | None = None,
        *,
        max_tokens: int | None = None,
        processes: int = 4,
        readers: int = 4,
        threads: int = 1,
        rows: GivenRows | None = None,
    ) -> None:
        self.processor = processor
        # Asking whether an object follows a protocol takes 20 µs.
        self._prompt_aware = processor if isinstance(processor, PromptAwareProcessor) else None
        self._rows = rows
        self._images = images or ImageLimits()
        self._videos = videos or VideoLimits()
        self._decoder = VideoDecoder(self._videos, processes=processes)
        self._documents = documents or DocumentLimits()
        self._reader = DocumentReader(self._documents, processes=readers)
        self._max_tokens = max_tokens
        self._crew = Crew(threads)

    def limit_threads(self, threads: int) -> None:
        """Let ``threads`` compute at a time, for the next images."""
        self._crew = Crew(threads)

    def for_prompt(self, sources: Sequence[MediaSource], images: int | None = None) -> MediaProcessor:
        """The processor for the media of one prompt: some models show an image otherwise among several.

        Args:
            images: number of the prompt's images; that of ``sources`` if None.

        Raises:
            InvalidRequest: the model takes no videos, and there is one.
        """
        for source in sources:
            if source.kind == "video" and not isinstance(self.processor, VideoProcessor):
                # The family's own message says what to send instead.
                _name_source(source, self.processor.prepare_video, Video((0, 0), 0, ()))
        if self._prompt_aware is not None:
            return self._prompt_aware.among(num_images(sources) if images is None else images)
        return self.processor

    def check(
        self, processor: MediaProcessor, sources: Sequence[MediaSource], data: Sequence[Sequence[bytes]]
    ) -> int:
        """Read the headers of images and frames; refuse those that need too much memory or too many tokens.

        Args:
            data: the encoded files of each source.

        Returns:
            Pixels of all images and frames; those of video files, which aren't opened yet, don't count.

        Raises:
            MediaError: a file is no image, or too large.
            ContextLengthExceeded: the images alone need more tokens than the model's context has.
        """
        sizes: list[tuple[int, int]] = []
        tokens = 0
        for source, files in zip(sources, data, strict=True):
            if source.is_video_file or source.rows is not None:
                continue
            measured = [read_size(image, self._images, where=source.where) for image in files]
            sizes += measured
            if source.kind == "image":
                tokens += _name_source(source, for_item(processor, source).check, measured[0])
        check_total(sizes, self._images)
        self._check_tokens(tokens)
        return sum(width * height for width, height in sizes)

    def prepare(
        self,
        processor: MediaProcessor,
        source: MediaSource,
        files: Sequence[bytes],
        account: Account | None = None,
    ) -> PreparedMedia:
        """Prepare one item from its encoded files: an image, a video's frames, a video file, or the file of
        :meth:`decode_rows`.

        Args:
            account: of the request; charged with the frames and pixels of a video file before they are
                decoded.

        Raises:
            MediaError: a file can't be decoded.
            InvalidRequest: the model can't be shown the item.
        """
        if source.rows is not None:
            assert self._rows is not None
            return self._rows.prepare(processor, source, files[0])
        if source.is_video_file:
            return self._video_file(for_item(processor, source), source, files[0], account)
        with self._crew.member():
            decoded = [decode(data, self._images, where=source.where) for data in files]
            made = self.show(processor, source, [each.image for each in decoded])
        return replace(made, note=next((each.note for each in decoded if each.note), ""))

    def decode_rows(self, processor: MediaProcessor, source: MediaSource) -> bytes:
        """The file with the embedding rows that ``source`` brings; errors as :meth:`GivenRows.decode`."""
        assert self._rows is not None
        return self._rows.decode(processor, source)

    def show(
        self, processor: MediaProcessor, source: MediaSource, images: Sequence[Image.Image]
    ) -> PreparedMedia:
        """Prepare one item from decoded images; errors as :meth:`prepare`."""
        processor = for_item(processor, source)
        with self._crew.member():
            if source.kind == "image":
                return _name_source(source, processor.prepare, images[0])
            video = _name_source(source, Video.of, images)
            video = Video(video.size, video.count, video.frames, _pace(source.video, len(images)))
            return replace(_name_source(source, processor.prepare_video, video), frames=len(images))

    def named(self, processor: NamelessProcessor, media: PreparedMedia) -> PreparedMedia:
        """``media``, prepared by a processor without names, with its content hash."""
        with self._crew.member():
            return processor.named(media)

    def open(self, source: MediaSource, data: bytes) -> PagedFile:
        """Open a document, or an image file of which several frames are asked for. Nothing is rendered.

        Raises:
            MediaError: it can't be read, or a page is too large.
            InvalidRequest: there are no such pages.
        """
        asked, where, limits = source.pages, source.where, self._documents
        assert asked is not None
        if source.kind == "image":
            count = count_frames(data, self._images, where=where)
            numbers = asked.choose(count, limits.max_pages, where)
            sizes = frame_sizes(data, numbers, self._images, where=where)
            return _paged(source, numbers, sizes, None)
        dpi = asked.dpi or limits.dpi
        if dpi > limits.max_dpi:
            raise InvalidRequest(f"{where}: dpi may be at most {limits.max_dpi:g}.", param=where)
        with self._reader.open(data, where) as document:
            numbers = asked.choose(document.count, limits.max_pages, where)
            sizes = document.sizes(numbers, dpi)
            for size in sizes:
                check_image_size(size, self._images, where)
            texts = [document.text(number) for number in numbers] if asked.text else []
        if sum(map(len, texts)) > limits.max_text:
            raise MediaTooLarge(
                f"{where}: the pages' text has more than {limits.max_text} characters; ask for fewer pages.",
                param=where,
            )
        return _paged(source, numbers, sizes, dpi, texts)

    def check_pages(self, processor: MediaProcessor, pages: Sequence[MediaSource]) -> int:
        """Refuse pages that need too much memory or too many tokens, before they are rendered.

        Returns:
            Pixels of all pages.

        Raises:
            MediaTooLarge, ContextLengthExceeded, InvalidRequest: as :meth:`check`.
        """
        sizes, tokens = [], 0
        for source in pages:
            assert source.page is not None
            sizes.append(source.page.size)
            tokens += _name_source(source, for_item(processor, source).check, source.page.size)
        check_total(sizes, self._images)
        self._check_tokens(tokens)
        return sum(width * height for width, height in sizes)

    def prepare_pages(
        self, processor: MediaProcessor, pages: Sequence[MediaSource], data: bytes
    ) -> list[PreparedMedia]:
        """Render and prepare pages of one file.

        Args:
            pages: sources that :meth:`open` made of the file.
            data: the file's bytes.

        Raises:
            MediaError: a page can't be rendered.
            InvalidRequest: the model can't be shown a page.
        """
        where = pages[0].where
        found: list[Page] = [source.page for source in pages if source.page is not None]
        if found[0].dpi is None:
            numbers = [page.number for page in found]
            images = decode_frames(data, numbers, self._images, where=where)
            return [self.show(processor, *pair) for pair in zip(pages, ([i] for i in images), strict=True)]
        with self._crew.member(), self._reader.open(data, where) as document:
            return [
                self.show(processor, source, [document.render(page.number, page.dpi)])
                for source, page in zip(pages, found, strict=True)
                if page.dpi is not None
            ]

    def close(self) -> None:
        """End the processes that decode videos and read documents."""
        self._decoder.close()
        self._reader.close()

    def _video_file(
        self, processor: MediaProcessor, source: MediaSource, data: bytes, account: Account | None
    ) -> PreparedMedia:
        def charge(frames: int, pixels: int) -> None:
            if account is not None:
                account.charge("frames", frames, source.where)
                account.charge("pixels", pixels, source.where)

        with self._crew.member(), self._decoder.open(data, source.where) as opened:
            return _name_source(
                source, lambda asked: self._shown(processor, opened, asked, charge), source.video
            )

    def _shown(
        self, processor: Any, opened: OpenVideo, asked: VideoOptions, charge: Callable[[int, int], None]
    ) -> PreparedMedia:
        info = opened.info
        indices = processor.choose_frames(info, asked)
        if len(indices) > self._videos.max_frames:
            raise MediaTooLarge(
                f"The model would be shown {len(indices)} frames of the video; {self._videos.max_frames} are "
                "allowed. Ask for fewer by fps or num_frames."
            )
        self._check_tokens(processor.check_video(info.size, len(indices)))
        charge(len(indices), len(indices) * info.size[0] * info.size[1])
        pace = Pace.of_indices(indices, info)
        shown = processor.prepare_video(Video(info.size, len(indices), opened.frames(indices), pace))
        return replace(shown, frames=len(indices))

    def _check_tokens(self, tokens: int) -> None:
        if self._max_tokens is not None and tokens >= self._max_tokens:
            raise ContextLengthExceeded.by(self._max_tokens, tokens, 1)


def _paged(
    source: MediaSource,
    numbers: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    dpi: float | None,
    texts: Sequence[str] = (),
) -> PagedFile:
    pages = [Page(number, size, dpi) for number, size in zip(numbers, sizes, strict=True)]
    return PagedFile(tuple(map(source.page_source, pages)), tuple(texts))


def for_item(processor: MediaProcessor, source: MediaSource) -> MediaProcessor:
    """The processor for one item, at the cost that its caller asks for.

    Raises:
        InvalidRequest: the model has no such option.
    """
    if source.detail != "low" and not source.options:
        return processor
    if isinstance(processor, AdjustableProcessor):
        if source.detail == "low":
            processor = processor.low_detail()
        return processor.with_options(source.options) if source.options else processor  # type: ignore[attr-defined]
    if source.options:
        name = next(iter(source.options))
        where = f"mm_processor_kwargs.{name}"
        raise InvalidRequest(f"{where}: this model has no options for requests.", param=where)
    return processor


def _pace(given: VideoOptions, count: int) -> Pace | None:
    if given.times:
        return Pace.of_times(given.times)
    return Pace.of_rate(count, given.fps) if given.fps else None


def _name_source(source: MediaSource, work: Callable[[Any], T], argument: Any) -> T:
    """Call a processor. Its errors get the ``where`` of ``source``, which the processor doesn't know."""
    try:
        return work(argument)
    except InvalidRequest as error:
        if not (error.param or "").startswith("mm_processor_kwargs"):
            error.param = source.where
        raise
