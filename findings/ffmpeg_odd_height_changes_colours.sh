#!/usr/bin/env bash
# FFmpeg 8 by PyAV 18.1: a video frame of an odd height has other colours in RGB, in every row.
#
# Frames of most videos are YUV with one pair of colour values for four pixels. libswscale turns them into RGB. For an
# even height it has a special routine, which gives the four pixels the same pair. For an odd height it takes the
# general one, which interpolates colour values between rows.
#
# Expected: a frame without its last row has the same pixels in all other rows. So it is where the last column, or the
# last two rows, are left out.
# What happens: without the last row every pixel differs. Most differ by 1 to 4 of 255, and those at an edge between
# colours by more than 100.
# Why it matters to a server of vision-language models: PyAV is how many servers, and Transformers' processors,
# decode videos. Two files of the same scene, 480 and 479 pixels high, show a model other colours, beside edges most of all.
# Whoever compares pixels, hashes or embeddings of frames must use the same routine, and clips of both kinds of height.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
cat > "$work/odd.py" <<'PY'
import av
import numpy as np

WIDTH, HEIGHT = 64, 60


def rgb(width, height):
    """The upper left of one picture: grey by its brightness, with a blue bar on red by its colour values."""
    frame = av.VideoFrame(width, height, "yuv420p")
    brightness = np.full((HEIGHT, WIDTH), 120, np.uint8)
    blue, red = np.full((HEIGHT // 2, WIDTH // 2), 90, np.uint8), np.full((HEIGHT // 2, WIDTH // 2), 200, np.uint8)
    blue[10:20], red[10:20] = 220, 80
    for plane, whole in zip(frame.planes, (brightness, blue, red), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = whole[: plane.height, : plane.width]
        plane.update(rows.tobytes())
    return frame.to_ndarray(format="rgb24").astype(int)


print("PyAV", av.__version__, "libswscale", av.library_versions["libswscale"])
whole, found = rgb(WIDTH, HEIGHT), {}
for width, height in ((64, 58), (63, 60), (64, 59), (63, 59)):
    apart = np.abs(rgb(width, height) - whole[:height, :width])
    found[width, height] = apart.any(-1).mean(), apart.max()
    print(f"{width} x {height}: {100 * found[width, height][0]:.0f} % of the pixels differ, by up to {apart.max()}")
for (_, height), (share, most) in found.items():
    assert (share, most) == (0, 0) if height % 2 == 0 else (share == 1 and most > 100)
PY
"$work/venv/bin/python" "$work/odd.py"
