"""Pages of documents, and frames of images, that models are shown as images."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InvalidRequest, MediaTooLarge


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a file.

    Attributes:
        number: its place in the file, from 0.
        size: ``(width, height)`` in pixels of its image.
        dpi: the resolution at which it is rendered; None for a frame of an image.
    """

    number: int
    size: tuple[int, int]
    dpi: float | None = None


@dataclass(frozen=True, slots=True)
class PageOptions:
    """The pages of a file that a caller asks for.

    Attributes:
        ranges: first and last page of each range, from 1; None stands for the file's last page. All pages if
            there are no ranges.
        max_pages: the first pages of these alone.
        dpi: pixels per inch; the server's own if None.
        text: whether the text of each page follows its image.
    """

    ranges: tuple[tuple[int, int | None], ...] = ()
    max_pages: int | None = None
    dpi: float | None = None
    text: bool = False

    def choose(self, count: int, limit: int, where: str) -> list[int]:
        """The places of the pages in a file of ``count`` pages, from 0.

        Args:
            limit: most pages.
            where: the field of the request, for errors.

        Raises:
            InvalidRequest: a range begins behind the last page.
            MediaTooLarge: there are more than ``limit``.
        """
        found: list[int] = []
        most = limit + 1 if self.max_pages is None else min(limit + 1, self.max_pages)
        for first, last in self.ranges or ((1, None),):
            if first > count:
                raise InvalidRequest(
                    f"{where}: there is no page {first}; the file has {count} pages.", param=where
                )
            found += range(first - 1, min(count if last is None else last, count))[: most - len(found)]
        if len(found) > limit:
            raise MediaTooLarge(
                f"{where}: the file has {count} pages; {limit} are allowed. Choose some by pages, such as "
                '"1-10", or by max_pages.',
                param=where,
            )
        return found


ALL_PAGES = PageOptions()
"""The caller asks for nothing in particular."""
