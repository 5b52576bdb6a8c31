#!/usr/bin/env bash
# PyAV 18.1: the rotation of a mirrored video is half a turn, so that code for upright frames turns it over.
#
# A video file says by a matrix how its frames are shown. Phones write one that turns; apps that record with the camera
# that faces its owner write one that mirrors, since the owner knows the mirror image. VideoFrame.rotation is "the angle
# by which the transformation rotates the frame".
#
# Expected: a frame that is mirrored from left to right isn't turned; or the property says that no turn will do.
# What happens: it is -180 there, and 0 for a frame that is to be turned over from top to bottom: FFmpeg's function
# behind it looks at one row of the matrix. Turned by it, both are upside down. The ffmpeg program itself looks at the
# matrix once more, and shows both as the file says.
# Why it matters to a server of vision-language models: it has to turn frames itself, as PyAV doesn't. Of such a video
# the model is shown people on their heads and text that can't be read, with no error. The matrix is in the frame's
# side data: columns are mirrored if its first number is negative, rows if its fifth is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6 imageio-ffmpeg==0.6.0
cat > "$work/mirrored.py" <<'PY'
import io
import struct
import subprocess
import sys
from importlib.metadata import version

import av
import imageio_ffmpeg
import numpy as np


def film(a, d):
    """An MP4 of 64 x 32 pixels, red at the upper left, whose matrix has a and d on its diagonal."""
    file = io.BytesIO()
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255, 0, 0
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    data = file.getvalue()
    start = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, 0, 0, 0, d << 16, 0, 0, 0, 1 << 30)
    return data[:start] + matrix + data[start + len(matrix) :]


def red(pixels):
    """Where the red quarter is."""
    rows, columns = np.nonzero(pixels[..., 0] > 128)
    return ("upper" if rows.mean() < 16 else "lower") + (" left" if columns.mean() < 32 else " right")


program = imageio_ffmpeg.get_ffmpeg_exe()
told = subprocess.run([program, "-version"], capture_output=True, text=True).stdout.split("\n")[0].split(" Copyright")[0]
print("PyAV", version("av"), "and", told)
for name, a, d, rotation, by_rotation, shown in (
    ("as it is", 1, 1, 0, "upper left", "upper left"),
    ("half a turn", -1, -1, -180, "lower right", "lower right"),
    ("mirrored", -1, 1, -180, "lower right", "upper right"),
    ("upside down", 1, -1, 0, "upper left", "lower left"),
):
    data = film(a, d)
    path = f"{sys.argv[1]}/{a}{d}.mp4"
    open(path, "wb").write(data)
    frame = next(av.open(io.BytesIO(data)).decode(video=0))
    turned = red(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
    raw = [program, "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    theirs = red(np.frombuffer(subprocess.run(raw, capture_output=True, check=True).stdout, np.uint8).reshape(32, 64, 3))
    print(f"{name}: rotation {frame.rotation}, turned by it red is {turned}; ffmpeg shows it {theirs}")
    assert (frame.rotation, turned, theirs) == (rotation, by_rotation, shown)
PY
"$work/venv/bin/python" "$work/mirrored.py" "$work"
