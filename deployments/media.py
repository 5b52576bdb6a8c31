"""A request's media through the preprocessor stage. Pages of documents are spread over its replicas."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from deployments.charges import MediaCharges
from deployments.stages import OpenFile, Pixels, PreprocessorStage
from deployments.tasks import all_or_none
from engine.media.source import MediaKind, MediaSource, check_media_limits, num_images
from engine.prompt import KeptFiles, MediaItem, PagesItem

#: Pages of a file that one call renders. Each call opens the file again.
_TOGETHER = 2


@dataclass(frozen=True, slots=True)
class Shown:
    """One of a request's media, prepared.

    Attributes:
        item: its place in the prompt.
        pixels: its images.
        kept: its files, if later requests may name it.
    """

    item: MediaItem | PagesItem
    pixels: tuple[Pixels, ...]
    kept: KeptFiles | None = None


async def prepare_media(
    stage: PreprocessorStage,
    sources: Sequence[MediaSource],
    files: Mapping[int, KeptFiles],
    caller: str,
    limits: Mapping[MediaKind, int],
    charges: MediaCharges,
    salt: str = "",
) -> list[Shown]:
    """Prepare all media of a request, in order.

    Args:
        files, caller: as of :meth:`PreprocessorStage.prepare`.
        limits: most items of each kind; pages count as images.
        charges: of the request; charged with pages before they are rendered.
        salt: keeps the caches of tenants apart.

    Raises:
        SightlineError: as :meth:`PreprocessorStage.open` and :meth:`PreprocessorStage.prepare`.
    """
    paged = [source for source in sources if source.pages is not None]
    if not paged:
        return [_whole(pixels) for pixels in await stage.prepare(sources, files, caller, None, salt)]
    whole = [source for source in sources if source.pages is None]
    opened = await stage.open(paged, _of(files, paged), caller, num_images(whole))
    pages = [page for file in opened for page in file.pages.sources]
    check_media_limits([*whole, *pages], limits)
    charges.pages(opened)
    images = num_images([*whole, *pages])
    work = [
        stage.prepare_pages(file, file.pages.sources[start : start + _TOGETHER], images, salt)
        for file in opened
        for start in range(0, len(file.pages.sources), _TOGETHER)
    ]
    if whole:
        work.append(stage.prepare(whole, _of(files, whole), caller, images, salt))
    made = await all_or_none(work)
    found = iter(made.pop() if whole else ())
    rendered, left = (pixels for group in made for pixels in group), iter(opened)
    return [
        _whole(next(found)) if source.pages is None else _pages(source, next(left), rendered)
        for source in sources
    ]


def _of(files: Mapping[int, KeptFiles], sources: Sequence[MediaSource]) -> dict[int, KeptFiles]:
    return {source.index: files[source.index] for source in sources if source.index in files}


def _whole(pixels: Pixels) -> Shown:
    return Shown(pixels.item, (pixels,), pixels.kept)


def _pages(source: MediaSource, file: OpenFile, rendered: Iterator[Pixels]) -> Shown:
    """The images shown of ``file``, whose pages are the next ones of ``rendered``."""
    pixels = tuple(islice(rendered, len(file.pages.sources)))
    item = PagesItem(tuple(each.item for each in pixels), tuple(file.pages.texts))
    return Shown(item, pixels, file.file if source.uuid else None)
