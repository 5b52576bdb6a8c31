"""Renders documents in processes that may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from engine.helpers.files import taken
from engine.media.documents.limits import DocumentLimits
from engine.media.file_pool import FileKind, FilePool, OpenFile

_KIND = FileKind(
    "document",
    Path(__file__).with_name("process.py"),
    "pypdfium2",
    smaller="ask for fewer pages, or a lower dpi",
)


class DocumentReader:
    """Reads PDF files; arguments as of :class:`~engine.media.file_pool.FilePool`."""

    def __init__(self, limits: DocumentLimits, *, processes: int = 2, queue_limit: float = 60.0) -> None:
        self._pool = FilePool(_KIND, limits.seconds, processes=processes, queue_limit=queue_limit)

    @contextlib.contextmanager
    def open(self, data: bytes, where: str) -> Iterator[OpenDocument]:
        """Open a document, as :meth:`~engine.media.file_pool.FilePool.open`; nothing is rendered yet."""
        with self._pool.open(data, where, True) as file:
            yield OpenDocument(file)

    def close(self) -> None:
        """End the processes; documents that are being read are waited for."""
        self._pool.close()


class OpenDocument:
    """A document that a process has opened. Every method raises as
    :meth:`~engine.media.file_pool.OpenFile.ask`.

    Attributes:
        count: number of pages.
        process_id: of the process.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file, self.process_id = file, file.process_id
        self.count: int = file.opened["pages"]

    def sizes(self, numbers: Sequence[int], dpi: float) -> list[tuple[int, int]]:
        """``(width, height)`` in pixels of the images of pages."""
        answer, _ = self._file.ask({"sizes": list(numbers), "dpi": dpi})
        return [(width, height) for width, height in answer["sizes"]]

    def text(self, number: int) -> str:
        """The text layer of a page."""
        return self._file.ask({"text": number})[0]["text"]

    def render(self, number: int, dpi: float) -> Image.Image:
        """The RGB image of a page."""
        answer, file = self._file.ask({"render": number, "dpi": dpi})
        assert file is not None
        return Image.fromarray(taken(file, (answer["height"], answer["width"], 3)))
