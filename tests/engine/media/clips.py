"""Video files for tests, made frame by frame."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)


def colour(index: int) -> tuple[int, int, int]:
    """RGB of frame ``index``: far from its neighbours', so that a decoder's loss doesn't hide a mistake."""
    return index * 67 % 256, index * 113 % 256, (255 - index * 29) % 256


def clip(
    frames: int,
    rate: Fraction | int = 25,
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    container: str = "mp4",
    times: Sequence[int] | None = None,
    matrix: tuple[int, int, int, int] | None = None,
    sound: bool = False,
    key_every: int = 12,
) -> bytes:
    """A video whose frames each have one colour.

    Args:
        size: ``(width, height)`` as stored.
        times: the millisecond of each frame, instead of a constant rate.
        matrix: of how the stored frames are shown; see :func:`shown_by`.
        sound: whether a sound track stands beside the video.
        key_every: frames from one key frame to the next.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = key_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = output.add_stream("aac", rate=8000) if sound else None
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), colour(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if voice is not None:
            samples = np.zeros((1, 8000), np.float32)
            silence = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            silence.sample_rate = 8000
            output.mux([*voice.encode(silence), *voice.encode()])
    data = file.getvalue()
    return data if matrix is None else shown_by(data, matrix)


def filmed(image: Image.Image, frames: int, rate: int) -> bytes:
    """A still image as an MP4, of even sides."""
    file, size = io.BytesIO(), (image.width // 2 * 2, image.height // 2 * 2)
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_image(image.crop((0, 0, *size)))))
        output.mux(stream.encode())
    return file.getvalue()


def decoded(data: bytes) -> list[np.ndarray]:
    """All frames as PyAV gives them, in order: uint8 ``(height, width, 3)``, not rotated."""
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def shown_by(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with another display matrix in its track header (ISO/IEC 14496-12, 8.3.2).

    Args:
        matrix: ``(a, b, c, d)``: a pixel at ``(x, y)``, with y downwards, is shown at
            ``(a x + c y, b x + d y)``, moved into view.
    """
    a, b, c, d = (value << 16 for value in matrix)
    start = data.index(b"tkhd") + 4 + 40
    written = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:start] + written + data[start + len(written) :]
