"""The sources of a request's media, and the limits on their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import MediaTooLarge
from engine.media.documents.pages import Page, PageOptions
from engine.media.video.video import ANY_FRAMES, VideoOptions

if TYPE_CHECKING:
    from PIL import Image

MediaKind = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class RowsSource:
    """Embedding rows in place of an image.

    Attributes:
        payload: a safetensors file in base64; empty if the file is kept under the source's ``uuid``.
        description: values by the name of the entry, such as ``image_grid_thw``.
    """

    payload: str
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MediaSource:
    """The source of an image, video or document. At most one of ``url``, ``data``, ``image``, ``frames``,
    ``page`` and ``rows`` is set; none if ``uuid`` names media of an earlier request. A video with ``url`` or
    ``data`` is a file.

    Attributes:
        index: its number in the request, from 0, to which :class:`~engine.prompt.MediaPart` refers.
        where: the field of the request, e.g. ``messages[0].content[1].image_url``.
        kind: ``image``, ``video`` or ``document``.
        url: an ``http``, ``https``, ``data`` or ``file`` URL.
        data: bytes of an encoded image or video file.
        image: a decoded image (offline use).
        frames: a video's frames in order.
        page: a page of a document, or a frame of an image, whose file the reader of this source has.
        pages: the pages of a document, or the frames of an image file, that are shown, each as an image; None
            for other sources.
        video: the frames of a video that are asked for.
        detail: OpenAI's hint: ``low`` shows an image at a lower cost, see
            :meth:`engine.families.base.AdjustableProcessor.low_detail`; ``auto``, ``high`` and ``original``
            show it as the model is configured.
        options: the request's ``mm_processor_kwargs``.
        rows: embedding rows in place of an image.
        uuid: the caller's own name for the content; empty if there is none.
    """

    index: int
    where: str
    kind: str = "image"
    url: str | None = None
    data: bytes | None = None
    image: Image.Image | None = None
    frames: tuple[MediaSource, ...] = ()
    page: Page | None = None
    pages: PageOptions | None = None
    video: VideoOptions = ANY_FRAMES
    detail: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: RowsSource | None = None
    uuid: str = ""

    @property
    def is_video_file(self) -> bool:
        return self.kind == "video" and not self.frames

    @property
    def is_reference(self) -> bool:
        """True if the source is nothing but the name of earlier media."""
        brought = (self.url, self.data, self.image, self.rows)
        return bool(self.uuid) and not self.frames and all(value is None for value in brought)

    def page_source(self, page: Page) -> MediaSource:
        """The source of one page of this one."""
        return MediaSource(self.index, self.where, page=page, detail=self.detail, options=self.options)


def num_images(sources: Sequence[MediaSource]) -> int:
    """Number of images among the sources; videos don't count."""
    return sum(source.kind == "image" for source in sources)


def check_media_limits(
    sources: Sequence[MediaSource], limits: Mapping[MediaKind, int], *, max_frames: int = 768
) -> None:
    """Refuse a request with too many media, before any of them costs anything.

    Args:
        limits: most items of each kind (``limit_mm_per_prompt``); a kind that is missing is unlimited. A page
            is an image, and a document at least one.
        max_frames: most frames of all videos together.

    Raises:
        MediaTooLarge: naming the limit.
    """
    for kind, limit in limits.items():
        kinds = (kind, "document") if kind == "image" else (kind,)
        given = [source for source in sources if source.kind in kinds]
        if len(given) > limit:
            pages = ", pages included" if any(source.page for source in given) else ""
            raise MediaTooLarge(
                f"The request has {len(given)} {kind}s{pages}, but limit_mm_per_prompt allows {limit}.",
                param=given[limit].where,
            )
    frames = sum(len(source.frames) for source in sources)
    if frames > max_frames:
        raise MediaTooLarge(
            f"The request has {frames} video frames; {max_frames} are allowed.", param="prompt"
        )
