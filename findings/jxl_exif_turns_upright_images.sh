#!/usr/bin/env bash
# pillow-jxl-plugin: an image that JPEG XL shows upright is turned by its EXIF field.
#
# In JPEG XL the orientation of an image stands in the header of its codestream; an EXIF block is information only,
# and a viewer ignores the orientation in it. Code for photographs turns an opened image by
# PIL.ImageOps.exif_transpose, as it must for JPEG.
#
# Expected: a JPEG XL file whose header says "upright" is shown as wide as it is stored, whatever its EXIF says.
# What happens: getexif() gives the block's orientation 6, and exif_transpose turns the upright image by 90 degrees.
# Why it matters to a server of vision-language models: converters copy EXIF blocks as they are. The model is then
# shown a page on its side, with no error, where a browser shows it upright.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pillow==12.3.0 pillow-jxl-plugin==1.3.8
cat > "$work/turned.py" <<'PY'
import io
from importlib.metadata import version

import pillow_jxl  # noqa: F401  registers the format
from PIL import Image, ImageOps

exif = Image.Exif()
exif[274] = 6
file = io.BytesIO()
Image.new("RGB", (40, 20)).save(file, "JXL", lossless=True, exif=exif.tobytes())
opened = Image.open(io.BytesIO(file.getvalue()))
opened.load()
turned = ImageOps.exif_transpose(opened)
print("pillow", version("pillow"), "pillow-jxl-plugin", version("pillow-jxl-plugin"))
print(f"decoded {opened.size}, EXIF orientation {opened.getexif().get(274)}, after exif_transpose {turned.size}")
assert opened.size == (40, 20), "the header's orientation turned the image"
assert opened.getexif().get(274) == 6 and turned.size == (20, 40), "the EXIF orientation is ignored now"
PY
"$work/venv/bin/python" "$work/turned.py"
