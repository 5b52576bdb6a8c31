#!/usr/bin/env bash
# A transparent PNG gives a vision model two different images in Transformers 5.23, by the way in which it is passed.
#
# One expects: an image processor's pixels depend on the image alone. The processors compose transparent pixels on
# white (transformers.image_transforms.convert_to_rgb).
# What happens: given by URL, as chat messages have it, the image goes through transformers.image_utils.load_image,
# which drops the alpha channel first. Fully transparent pixels then show the colours beneath them, mostly black.
# Why it matters to a VLM server: logos, icons and screenshots are transparent PNGs. Equality with "Transformers" is
# not defined for them: a reference run with PIL images and one with URLs disagree in every transparent pixel.
#
# Exit status: 0 while the two differ, 1 once they are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 pillow==13.0.0 numpy==2.4.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PY'
import base64
import io
import sys

import numpy
import PIL
import transformers
from PIL import Image
from transformers.image_utils import load_image

print("transformers", transformers.__version__, "| pillow", PIL.__version__, "| numpy", numpy.__version__)
image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
image.paste((200, 30, 40, 255), (16, 16, 48, 48))
buffer = io.BytesIO()
image.save(buffer, "PNG")
opened = Image.open(io.BytesIO(buffer.getvalue()))
loaded = load_image("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
processor = transformers.CLIPImageProcessorPil()
pixels = [processor(one, return_tensors="np")["pixel_values"][0, :, 0, 0] for one in (opened, loaded)]
print("expected: the same pixels, whichever way the image is passed")
print("a transparent corner of a red square on nothing, normalised by CLIP's processor:")
print("  passed as a PIL image:", pixels[0].round(3), "(white)")
print("  passed as a URL:      ", pixels[1].round(3), "(black)")
sys.exit(int(numpy.allclose(*pixels)))
PY
