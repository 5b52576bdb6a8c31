"""Video files: which frames they have, which of them are read, and what a hostile file can do."""

from __future__ import annotations

import io
import math
import os
import random
import signal
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from av.sidedata.sidedata import Type
from PIL import Image, ImageColor

from engine.errors import MediaError, MediaTooLarge
from engine.media.video.container import UnreadableVideo, VideoFile
from engine.media.video.decoder import VideoDecoder
from engine.media.video.display import Display
from engine.media.video.limits import VideoLimits
from tests.engine.media.clips import FILM, NTSC, clip, colour, decoded, filmed, shown_by

FORMATS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("avi", "libx264"),
]


def opened(data: bytes, most: int = 1000) -> VideoFile:
    return VideoFile(io.BytesIO(data), most)


@pytest.fixture(scope="module")
def decoder():
    decoder = VideoDecoder(VideoLimits(decode_seconds=60), processes=2)
    yield decoder
    decoder.close()


@pytest.mark.parametrize(("container", "codec"), FORMATS)
@pytest.mark.parametrize(("frames", "rate"), [(2, 25), (41, NTSC), (50, FILM), (31, 60)], ids=str)
def test_chosen_frames_are_those_of_a_decoder_that_reads_all(container, codec, frames, rate):
    data = clip(frames, rate, container=container, codec=codec)
    whole, video = decoded(data), opened(data)
    assert (video.info.frames, video.info.size) == (len(whole), (64, 48))
    assert video.info.fps == pytest.approx(float(rate), rel=1e-6)
    draw = random.Random(frames)
    for indices in (
        range(frames),
        [frames - 1],
        sorted(draw.choices(range(frames), k=6)),
        range(0, frames, max(frames // 2, 1)),
    ):
        found = list(video.frames(list(indices)))
        assert len(found) == len(indices)
        assert all((frame == whole[index]).all() for frame, index in zip(found, indices, strict=True))


def test_a_clip_of_one_frame_and_a_sound_track():
    video = opened(clip(1, 25, sound=True))
    assert video.info.frames == 1
    (frame,) = video.frames([0])
    assert np.abs(frame.astype(int) - colour(0)).max() < 12


def test_frames_of_a_variable_rate_are_those_on_the_screen():
    times = [0, 33, 66, 1000, 1033, 2000, 2500, 2533, 4000]
    data = clip(9, times=times)
    whole, video = decoded(data), opened(data)
    assert video.info.frames == 9
    assert video.info.duration == pytest.approx(4.0, abs=0.2)
    found = list(video.frames(range(9)))
    for index, frame in enumerate(found):
        second = index / video.info.fps
        shown = max(i for i, time in enumerate(times) if time / 1000 <= second + 1e-3)
        assert (frame == whole[shown]).all()


SIGNS = tuple(product((1, -1), repeat=2))


@pytest.mark.parametrize("matrix", [(i, 0, 0, j) for i, j in SIGNS] + [(0, i, j, 0) for i, j in SIGNS])
def test_frames_are_upright_and_not_mirrored(matrix):
    """All eight ways to show a frame, whose quarters differ. Cameras that face their owner mirror."""
    quarters = Image.new("RGB", (2, 2))
    for place, each in {(0, 0): "red", (1, 0): "lime", (0, 1): "blue", (1, 1): "white"}.items():
        quarters.putpixel(place, ImageColor.getrgb(each))
    stored = filmed(quarters.resize((64, 32), Image.Resampling.NEAREST), 3, 10)
    video, (whole, *_) = opened(shown_by(stored, matrix)), decoded(stored)
    a, b, c, d = matrix
    y, x = np.indices(whole.shape[:2])
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    width, height = columns.max() + 1, rows.max() + 1
    wanted = np.zeros((height, width, 3), np.uint8)
    wanted[rows, columns] = whole
    assert video.info.size == (width, height)
    for frame in video.frames(range(3)):
        assert (frame == wanted).all()


@pytest.mark.parametrize(("degrees", "nearest"), [(30, 0), (60, 90), (-60, -90), (120, 90), (150, 180)])
def test_a_tilted_frame_is_shown_at_the_nearest_quarter_turn(degrees, nearest):
    def display(angle: int) -> Display:
        c, s = (round(65536 * f(math.radians(angle))) for f in (math.cos, math.sin))
        matrix = np.array([c, s, 0, -s, c, 0, 0, 0, 1 << 30], np.int32)
        return Display.of(SimpleNamespace(side_data={Type.DISPLAYMATRIX: matrix.tobytes()}))

    assert display(degrees) == display(nearest)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "in no format"),
        (b"no video", "in no format"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n", "in no format"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "in no format"),
        (clip(9)[:600], "in no format"),
        (clip(9), "more than 8 frames"),
    ],
)
def test_other_files_are_refused(data, why):
    with pytest.raises(UnreadableVideo, match=why):
        opened(data, most=8)


def test_a_process_decodes(decoder):
    data = clip(40, NTSC, size=(640, 480))
    whole = decoded(data)
    with decoder.open(data, "here") as video:
        assert video.info.frames == 40
        frames = [np.asarray(image) for image in video.frames([0, 7, 7, 39])]
    assert all((frame == whole[index]).all() for frame, index in zip(frames, [0, 7, 7, 39], strict=True))


def test_a_reader_may_stop_early(decoder):
    data = clip(40, size=(64, 48))
    with decoder.open(data, "here") as video:
        next(iter(video.frames(range(40))))
    with decoder.open(data, "here") as video:
        assert len(list(video.frames([3, 4]))) == 2


def test_faults_name_the_field(decoder):
    with pytest.raises(MediaError, match=r"^here: the video can't be read: it is in no format") as error:
        decoder.open(b"nothing", "here").__enter__()
    assert error.value.param == "here"


@pytest.mark.parametrize(
    ("limits", "why"),
    [({"max_seconds": 1.0}, "2 seconds long"), ({"max_pixels": 3000}, "64 x 48 pixels")],
)
def test_limits_are_checked_before_decoding(limits, why):
    decoder = VideoDecoder(VideoLimits(**limits), processes=1)
    try:
        with pytest.raises(MediaTooLarge, match=why):
            decoder.open(clip(50), "here").__enter__()
    finally:
        decoder.close()


def test_a_process_that_dies_or_hangs_is_replaced(decoder):
    data = clip(5)
    with pytest.raises(MediaError, match="more memory than allowed"), decoder.open(data, "here") as video:
        os.kill(video.process_id, signal.SIGKILL)
        list(video.frames([0]))
    slow = VideoDecoder(VideoLimits(decode_seconds=3), processes=1)
    with pytest.raises(MediaError, match="3 seconds"), slow.open(data, "here") as video:
        os.kill(video.process_id, signal.SIGSTOP)
        list(video.frames([0]))
    for replaced in (decoder, slow):
        with replaced.open(data, "here") as video:
            assert len(list(video.frames([0, 4]))) == 2
    slow.close()


def test_an_exact_rate_is_kept():
    assert opened(clip(10, Fraction(24000, 1001))).info.fps == 24000 / 1001
