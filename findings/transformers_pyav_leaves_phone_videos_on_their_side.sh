#!/usr/bin/env bash
# Transformers 5.23: a phone's upright video lies on its side with the backend pyav, and stands with opencv.
#
# Phones store frames as the sensor reads them, and write into the file how a player has to turn them. load_video, by
# which processors read videos, has several backends to decode with.
#
# Expected: a file's frames are the same whatever decodes them, or the backends' documentation says how they differ.
# What happens: pyav, the default of load_video, ignores the file's turn, and metadata has the size as it is stored.
# OpenCV turns the frames. So one call gives 64 x 32 pixels and the other 32 x 64 for the same file, without a warning.
# Of a mirrored video, as apps with a camera that faces its owner write it, pyav shows the mirror image's opposite and
# OpenCV turns it upside down: neither is what a player shows.
# Why it matters to a server of vision-language models: resizing follows the sides, so the number of tokens differs as
# well as the picture; and text in a video that lies on its side is not read. Whoever compares with a reference has to
# say by which backend its frames came; whoever serves has to turn frames by the file's matrix.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 av==18.1.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$work/upright.py" <<'PY'
import struct
import sys
from importlib.metadata import version

import av
import numpy as np
from transformers.video_utils import load_video


def film(path, a, b, c, d):
    """Write an MP4 of 64 x 32 pixels, red at the upper left, that is to be shown by the matrix a, b, c, d."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255, 0, 0
    with av.open(path, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    data = open(path, "rb").read()
    start = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    open(path, "wb").write(data[:start] + matrix + data[start + len(matrix) :])


def shown(path, backend):
    """Width and height of the frames, and where red is."""
    video, _ = load_video(path, num_frames=2, backend=backend)
    frame = np.asarray(video)[0]
    height, width = frame.shape[:2]
    rows, columns = np.nonzero(frame[..., 0] > 128)
    place = ("upper" if rows.mean() < height / 2 else "lower") + (" left" if columns.mean() < width / 2 else " right")
    return width, height, place


print("transformers", version("transformers"), "PyAV", version("av"), "OpenCV", version("opencv-python-headless"))
for name, matrix, player, by_pyav, by_opencv in (
    ("as it is", (1, 0, 0, 1), (64, 32, "upper left"), (64, 32, "upper left"), (64, 32, "upper left")),
    ("a quarter clockwise", (0, 1, -1, 0), (32, 64, "upper right"), (64, 32, "upper left"), (32, 64, "upper right")),
    ("mirrored", (-1, 0, 0, 1), (64, 32, "upper right"), (64, 32, "upper left"), (64, 32, "lower right")),
):
    path = f"{sys.argv[1]}/film.mp4"
    film(path, *matrix)
    found = shown(path, "pyav"), shown(path, "opencv")
    print(f"{name}: a player shows {player}, pyav {found[0]}, opencv {found[1]}")
    assert found == (by_pyav, by_opencv)
PY
"$work/venv/bin/python" "$work/upright.py" "$work"
