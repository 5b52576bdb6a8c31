"""Limits on documents and on images with several frames."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from engine.settings import Settings


class DocumentLimits(Settings):
    """The pages that are shown to a model.

    Attributes:
        dpi: pixels per inch at which pages are rendered, unless the caller asks for another resolution.
        max_dpi: the most that a caller may ask for.
        max_pages: most pages that a model is shown of one document, or frames of one image.
        max_text: most characters of a document's text.
        seconds: most seconds that opening a document, or rendering pages of it in one go, may take.
    """

    dpi: PositiveFloat = 144.0
    max_dpi: PositiveFloat = 600.0
    max_pages: PositiveInt = 100
    max_text: PositiveInt = 1 << 20
    seconds: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _pages_may_be_rendered(self) -> Self:
        if self.dpi > self.max_dpi:
            raise ValueError(f"dpi is {self.dpi:g}, more than max_dpi, {self.max_dpi:g}")
        return self
