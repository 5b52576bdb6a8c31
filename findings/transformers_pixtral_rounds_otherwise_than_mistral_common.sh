#!/usr/bin/env bash
# Transformers 5.23 and mistral-common 1.13 give some images of Pixtral and Mistral Small 3 different numbers of tokens.
#
# Both shrink an image to at most 1540 pixels a side and then count squares of 28 pixels. mistral-common, the publisher's
# own library, rounds the shrunk sides to the nearest pixel; Transformers' processor rounds them down.
# Expected: an image of 312 x 2440 pixels has as many tokens in both; the model was trained with the publisher's.
# Shrunk, it is 196.9 pixels wide: 8 columns of squares by mistral-common, 7 by Transformers. An image of 1 x 1879 pixels
# has 55 rows by mistral-common, and none by Transformers, whose processor then fails.
# Why it matters to a server of vision-language models: a server with the one library gives other prompts, and other
# numbers of tokens to pay for, than a server with the other. Of sizes drawn up to 4000 pixels about 2 in 100 differ.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 mistral-common==1.13.1 pillow==12.0.0 numpy
cat > "$work/probe.py" <<'PY'
import importlib.metadata
import math
import random
from types import SimpleNamespace

import numpy as np
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

for name in ("transformers", "mistral-common"):
    print(name, importlib.metadata.version(name))
config = ImageConfig(image_patch_size=14, max_image_size=1540, spatial_merge_size=2)
encoder = ImageEncoder(config, SpecialImageIDs(img=10, img_break=12, img_end=13))


def publishers(width, height):
    return tuple(encoder._image_to_num_tokens(SimpleNamespace(size=(width, height))))


def transformers(width, height):
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    high, wide = get_resize_output_image_size(image, (1540, 1540), (28, 28), "channels_last")
    return wide // 28, high // 28


for size in ((312, 2440), (1, 1879), (1540, 1540), (3000, 2000)):
    print(f"{size[0]} x {size[1]}: columns and rows {publishers(*size)} and {transformers(*size)}")
draw = random.Random(0)
sizes = [tuple(round(math.exp(draw.uniform(0, math.log(4000)))) for _ in range(2)) for _ in range(2000)]
different = sum(publishers(*size) != transformers(*size) for size in sizes)
print(f"{different} of {len(sizes)} drawn sizes differ")
assert publishers(312, 2440) == (8, 55) and transformers(312, 2440) == (7, 55), "both round alike now"
assert 0 < different < 100
PY
"$work/venv/bin/python" "$work/probe.py"
