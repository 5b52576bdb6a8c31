"""Limits on videos."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from engine.settings import Settings


class VideoLimits(Settings):
    """The longest video that is decoded.

    Attributes:
        max_bytes: most bytes of a video file.
        max_seconds: most seconds that a video lasts.
        max_source_frames: most frames that a video file may hold.
        max_frames: most frames that a model is shown, of all videos of a request together.
        max_pixels: most pixels of a frame, width times height.
        decode_seconds: most seconds that decoding one video may take.
    """

    max_bytes: PositiveInt = 256 << 20
    max_seconds: PositiveFloat = 7200.0
    max_source_frames: PositiveInt = 1 << 20
    max_frames: PositiveInt = 768
    max_pixels: PositiveInt = 64_000_000
    decode_seconds: PositiveFloat = 120.0
