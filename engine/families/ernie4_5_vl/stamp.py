"""Times that are drawn onto the frames of a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import ImageDraw, ImageFont

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.parsing.fields import Json

if TYPE_CHECKING:
    from PIL import Image

_USUAL_FONT = "Roboto-Regular.ttf"
#: The height of a text by the shorter side of its frame, and its outline by that height.
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class TimeStamp:
    """Writes the time of a frame into its upper left corner, in black with a white outline, as Transformers'
    ``Ernie4_5_VLMoeVideoProcessor`` does.

    Attributes:
        font: the content of a font file; empty if the checkpoint has none.
        name: of that file.
    """

    font: bytes = field(repr=False)
    name: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, stated: Json) -> TimeStamp | None:
        """The stamp of a checkpoint by its video processor's options; None if frames are shown as they are.

        Raises:
            CheckpointError: the font is no font file in the checkpoint's folder.
        """
        draws, name = stated.get("draw_on_frames", True), stated.get("font", _USUAL_FONT)
        if not draws:
            return None
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise CheckpointError(f"font {name!r} should be the name of a file in the folder", param="font")
        if not checkpoint.has(name):
            return cls(b"", name)
        font = (checkpoint.path / name).read_bytes()
        try:
            ImageFont.truetype(BytesIO(font))
        except OSError as error:
            raise CheckpointError(f"{name} is no font file: {error}", param="font") from error
        return cls(font, name)

    def check(self, size: tuple[int, int]) -> None:
        """Refuse what can't be drawn onto frames of ``(width, height)`` pixels.

        Raises:
            InvalidRequest: the checkpoint has no font, or the frames are too small for it.
        """
        if not self.font:
            raise InvalidRequest(
                f"This model reads times on the frames of videos, and its folder lacks the font {self.name}. "
                "Put the file there, or send frames as images.",
                param="video",
            )
        if not int(min(size) * _SHARE):
            raise InvalidRequest(
                f"Frames of {size[0]}x{size[1]} pixels are too small for the times that this model reads on "
                "them: both sides should have at least 10.",
                param="video",
            )

    def __call__(self, frame: Image.Image, seconds: float) -> Image.Image:
        """A copy of ``frame`` with the time ``seconds``."""
        height = int(min(frame.size) * _SHARE)
        stamped = frame.copy()
        ImageDraw.Draw(stamped).text(
            (0, 0),
            _written(seconds),
            font=ImageFont.truetype(BytesIO(self.font), height),
            fill=(0, 0, 0),
            stroke_width=int(height * _SHARE),
            stroke_fill=(255, 255, 255),
        )
        return stamped


def _written(seconds: float) -> str:
    """``time: hh:mm:ss.ss``. Seconds are rounded, so that they may be 60."""
    hours, rest = seconds // 3600, seconds % 3600
    return f"time: {int(hours):02d}:{int(rest // 60):02d}:{rest % 60:05.02f}"
