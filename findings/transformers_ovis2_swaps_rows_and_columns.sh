#!/usr/bin/env bash
# Transformers 5.23: Ovis2's image processor lays the tiles of a wide image below each other, those of a tall one side
# by side.
#
# It looks for the fewest tiles that show 90 % of an image at its own resolution, and counts them as (rows, columns).
# The tiling that it finds is then unpacked as "num_columns, num_rows".
# Expected: an image of two squares side by side becomes two tiles in one row, each one of the squares.
# It becomes two rows of one column: the image is squeezed to half its width and stretched to twice its height, and each
# tile shows half of both squares. By use_covering_area_grid=False the same image is cut in one row of two tiles.
# Why it matters to a server of vision-language models: tiles exist for small text, and each line of it is cut in a wide
# image. A server that cuts them right gives other pixels and other tokens (<IMG_ROW> for <IMG_COL>) than the reference.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 pillow==12.0.0 numpy
cat > "$work/probe.py" <<'PY'
import numpy as np
import transformers
from PIL import Image
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

print("transformers", transformers.__version__)
SIDE = 448
red, blue = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
wide = Image.new("RGB", (2 * SIDE, SIDE))
wide.paste(red, (0, 0))
wide.paste(blue, (SIDE, 0))
processor = Ovis2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, do_normalize=False)


def tiles(**options):
    made = processor([wide], return_tensors="np", **options)
    shown = [sorted({("red", "blue")[int(np.argmax(column) > 0)] for column in tile[:, 200].T.round()})
             for tile in np.asarray(made["pixel_values"])[1:]]
    return made["grids"].tolist(), shown


for name, options in (("covering", {}), ("by aspect ratio", {"use_covering_area_grid": False})):
    print(f"{name}: rows and columns {tiles(**options)[0]}, colours in each tile {tiles(**options)[1]}")
assert tiles() == ([[2, 1]], [["blue", "red"]] * 2), "a wide image is cut into columns now"
assert tiles(use_covering_area_grid=False) == ([[1, 2]], [["red"], ["blue"]])
PY
"$work/venv/bin/python" "$work/probe.py"
