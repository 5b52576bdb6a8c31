#!/usr/bin/env bash
# Pillow 13.0, Transformers 5.23: a grey PNG of 16 bits turns white; the same picture as RGB of 16 bits does not.
#
# PNG stores samples of 8 or 16 bits, grey or RGB. Scanners, microscopes and X-ray exports write 16 bits.
#
# Expected: "convert('RGB')" scales samples to 8 bits, as it does for RGB of 16 bits: a grey ramp stays a ramp.
# What happens: Pillow opens the grey file in mode "I;16" and its conversion clips instead of scaling: all samples
# above 255 become 255, so that all but the darkest 0.4 % of a ramp is white. Opened as RGB the same ramp is right.
# Transformers' load_image, through which its processors take URLs and files, converts so too. Nothing is reported.
# Why it matters to a server of vision-language models: the model is shown a white page and describes it fluently.
# A server has to scale such samples itself before it converts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6 transformers==5.23.0
cat > "$work/grey.py" <<'PY'
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.image_utils import load_image

SIDE, GREY, RGB = 256, 0, 2


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, colours):
    """A file of 16-bit samples ``(height, width, channels)``; a row begins with the number of its filter."""
    height, width, _ = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


ramp = np.linspace(0, 65535, SIDE)[None, :, None].repeat(4, 0).astype(np.uint16)
files = {"grey": png(ramp, GREY), "rgb": png(ramp.repeat(3, 2), RGB)}
print("Pillow", PIL.__version__, "transformers", transformers.__version__)
seen = {}
for name, data in files.items():
    path = Path(sys.argv[1]) / f"{name}.png"
    path.write_bytes(data)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(pixels, np.asarray(load_image(str(path))))
    seen[name] = pixels[0, :, 0]
    print(f"{name:>5}: mode {Image.open(path).mode}, every 32nd pixel of the ramp", seen[name][::32].tolist())
assert np.abs(seen["rgb"].astype(int) - np.arange(SIDE)).max() <= 1
assert (seen["grey"][1:] == 255).all(), "the conversion scales now"
PY
"$work/venv/bin/python" "$work/grey.py" "$work"
