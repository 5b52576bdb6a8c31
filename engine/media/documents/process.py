"""The helper process that renders documents. It imports little of the engine.

=========================================  ================================================================
message                                    answer
=========================================  ================================================================
``{"memory": bytes}``                      ``{}``; from now on the process takes no more than that
``{"open": true}`` and a file              ``{"pages": their number}``
``{"sizes": [page, ...], "dpi": number}``  ``{"sizes": [[width, height], ...]}`` in pixels
``{"text": page}``                         ``{"text": the page's text layer}``
``{"render": page, "dpi": number}``        ``{"height", "width"}`` and a file with the page's RGB bytes
=========================================  ================================================================

Any answer may be ``{"error": reason}`` instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The engine beside this file, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parents[3]))

from engine.helpers.child import guarded, serve
from engine.helpers.files import written
from engine.media.documents.pdf import PdfFile, UnreadableDocument


class Renderer:
    """The document that is open."""

    def __init__(self) -> None:
        self._document: PdfFile | None = None

    def answer(self, message: dict[str, Any], files: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Answer one message of the table above."""
        if "open" in message:
            return {"pages": self._open(files[0])}, []
        assert self._document is not None
        if "sizes" in message:
            return {"sizes": self._document.sizes(message["sizes"], message["dpi"])}, []
        if "text" in message:
            return {"text": self._document.text(message["text"])}, []
        pixels = self._document.render(message["render"], message["dpi"])
        return {"height": pixels.shape[0], "width": pixels.shape[1]}, [written([pixels])]

    def _open(self, descriptor: int) -> int:
        if self._document is not None:
            self._document.close()
        self._document = None
        with os.fdopen(descriptor, "rb") as file:
            self._document = PdfFile(file.read())
        return self._document.count


if __name__ == "__main__":
    serve(guarded(Renderer().answer, UnreadableDocument))
