"""Renders documents in processes that may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from engine.errors import MediaError, Unavailable
from engine.helpers.files import file_of, taken
from engine.helpers.pool import Helper, HelperPool, Task
from engine.media.documents.limits import DocumentLimits

#: Address space of a process: the document, its fonts and images, and the page that is rendered.
_MEMORY = 2 << 30


class DocumentReader:
    """Reads PDF files in a small pool of processes. Thread-safe.

    Args:
        limits: on documents.
        processes: documents read at a time.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(self, limits: DocumentLimits, *, processes: int = 2, queue_limit: float = 60.0) -> None:
        self._limits = limits
        self._pool = HelperPool(
            _start,
            processes,
            busy="Too many documents are being read; try again later.",
            queue_limit=queue_limit,
        )

    @contextlib.contextmanager
    def open(self, data: bytes, where: str) -> Iterator[OpenDocument]:
        """Open a document; nothing is rendered yet.

        Args:
            data: the file's bytes.
            where: the field of the request, for errors.

        Raises:
            MediaError: the file can't be read.
            Overloaded: all processes are busy with other documents.
            Unavailable: no process can be started.
        """
        if find_spec("pypdfium2") is None:
            raise Unavailable("This server reads no documents: its package pypdfium2 is not installed.")
        with self._pool.helper() as helper:
            yield OpenDocument(helper, data, where, self._limits)

    def close(self) -> None:
        """End the processes; documents that are being read are waited for."""
        self._pool.close()


def _start() -> Helper:
    return Helper(Path(__file__).with_name("process.py"), {"memory": _MEMORY}, "reads documents")


class OpenDocument:
    """A document that a process has opened. Every method raises as :meth:`DocumentReader.open`.

    Attributes:
        count: number of pages.
        process_id: of the process.
    """

    def __init__(self, helper: Helper, data: bytes, where: str, limits: DocumentLimits) -> None:
        self._where = where
        self.process_id = helper.process_id
        exhausted = (
            f"it takes more than {limits.seconds:g} seconds or more memory than allowed to read; ask for "
            "fewer pages, or a lower dpi"
        )
        self._task = Task(helper, limits.seconds, self._error, exhausted)
        with file_of(data) as file:
            answer, _ = self._task.ask({"open": True}, file)
        self.count: int = answer["pages"]

    def sizes(self, numbers: Sequence[int], dpi: float) -> list[tuple[int, int]]:
        """``(width, height)`` in pixels of the images of pages."""
        answer, _ = self._task.ask({"sizes": list(numbers), "dpi": dpi})
        return [(width, height) for width, height in answer["sizes"]]

    def text(self, number: int) -> str:
        """The text layer of a page."""
        return self._task.ask({"text": number})[0]["text"]

    def render(self, number: int, dpi: float) -> Image.Image:
        """The RGB image of a page."""
        answer, file = self._task.ask({"render": number, "dpi": dpi})
        assert file is not None
        return Image.fromarray(taken(file, (answer["height"], answer["width"], 3)))

    def _error(self, reason: str) -> MediaError:
        return MediaError(f"{self._where}: the document can't be read: {reason}.", param=self._where)
