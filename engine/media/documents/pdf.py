"""Reads PDF files with PDFium."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pypdfium2
from pypdfium2 import raw

#: Points per inch.
_POINTS = 72
_HYPHEN = "\x02"
_ENCRYPTED = "it is encrypted; send it without a password"
#: Reasons by PDFium's numbers.
_FAULTS = {raw.FPDF_ERR_PASSWORD: _ENCRYPTED, raw.FPDF_ERR_SECURITY: _ENCRYPTED}


class UnreadableDocument(Exception):
    """The file is no PDF, or is damaged. The text says which, for the caller to read."""


class PdfFile:
    """An opened PDF file.

    Args:
        data: the file's bytes.

    Attributes:
        count: number of pages.

    Raises:
        UnreadableDocument: it can't be read without a password, is no PDF, or has no pages.
    """

    def __init__(self, data: bytes) -> None:
        # PDFium reads the bytes until the document is closed.
        self._data = data
        handle = raw.FPDF_LoadMemDocument64(data, len(data), None)
        if not handle:
            raise UnreadableDocument(_FAULTS.get(raw.FPDF_GetLastError(), "it is no PDF, or is damaged"))
        self.count: int = raw.FPDF_GetPageCount(handle)
        if self.count < 1:
            raw.FPDF_CloseDocument(handle)
            raise UnreadableDocument("it has no pages")
        self._document = pypdfium2.PdfDocument(handle)
        # Without this, what somebody has filled into a form isn't shown.
        self._document.init_forms()

    def sizes(self, numbers: Sequence[int], dpi: float) -> list[tuple[int, int]]:
        """``(width, height)`` in pixels of pages that are rendered at ``dpi``, without rendering them."""
        found = []
        for number in numbers:
            with _faults(number):
                width, height = self._document.get_page_size(number)
            found.append((math.ceil(width * (dpi / _POINTS)), math.ceil(height * (dpi / _POINTS))))
        return found

    def render(self, number: int, dpi: float) -> np.ndarray:
        """A page as PDFium shows it on white: uint8 RGB ``(height, width, 3)``."""

        def draw(page: Any) -> np.ndarray:
            bitmap = page.render(scale=dpi / _POINTS, rev_byteorder=True)
            try:
                return bitmap.to_numpy()[:, :, :3].copy()
            finally:
                bitmap.close()

        return self._on_page(number, draw)

    def text(self, number: int) -> str:
        """The text layer of a page, as PDFium orders it; empty if the page has none."""

        def read(page: Any) -> str:
            layer = page.get_textpage()
            try:
                found = layer.get_text_bounded().replace("\r\n", "\n")
                return _with_hyphens(found, layer)
            finally:
                layer.close()

        return self._on_page(number, read)

    def close(self) -> None:
        self._document.close()

    def _on_page(self, number: int, work: Callable[[Any], Any]) -> Any:
        with _faults(number):
            page = self._document[number]
            try:
                return work(page)
            finally:
                page.close()


def _with_hyphens(text: str, layer: Any) -> str:
    """``text`` of a page with its hyphens at line ends. PDFium writes U+0002 for such a hyphen and its line's
    end. Whether the word has a hyphen is left to the reader, as on the page."""
    if _HYPHEN not in text:
        return text
    # A font that doesn't say what its letters mean may have a letter of that number.
    places = [i for i in range(layer.count_chars()) if raw.FPDFText_GetUnicode(layer.raw, i) == ord(_HYPHEN)]
    first, *others = text.split(_HYPHEN)
    if len(places) != len(others):
        return text
    joints = ["-\n" if raw.FPDFText_IsHyphen(layer.raw, place) else _HYPHEN for place in places]
    return first + "".join(joint + piece for joint, piece in zip(joints, others, strict=True))


@contextmanager
def _faults(number: int) -> Iterator[None]:
    try:
        yield
    except pypdfium2.PdfiumError as error:
        raise UnreadableDocument(f"its page {number + 1} is damaged") from error
