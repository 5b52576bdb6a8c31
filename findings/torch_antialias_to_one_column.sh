#!/usr/bin/env bash
# PyTorch: antialiased interpolation to a width of 1 and another height is wrong on a CPU.
#
# Towers of the NaFlex kind (SigLIP 2) keep a square table of positions and resize it to the grid of each image. Up to
# Transformers 5.23 they do so by F.interpolate(..., mode="bilinear", antialias=True).
#
# Expected: each channel is as Pillow resizes it, which this mode follows.
# What happens: with an output width of 1 and a height that isn't the input's, rows of a contiguous tensor's result
# have the numbers of other rows. Other widths are right, and so is the same input in channels-last order. Transformers'
# table is read as a contiguous one, by the stride of its batch axis; 5.24 multiplies by matrices of weights and is right.
# Why it matters to a server of vision-language models: an image one patch wide gets the positions of another place,
# without an error; and its answers change with the release of Transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pillow==12.3.0 torch==2.13.0 \
  --extra-index-url https://download.pytorch.org/whl/cpu
cat > "$work/interpolate.py" <<'PY'
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

torch.manual_seed(0)
table = torch.randn(1, 8, 5, 5)
orders = {"contiguous": table, "channels last": table.to(memory_format=torch.channels_last)}
wrong = []
for height, width in ((3, 1), (10, 1), (5, 1), (10, 2), (1, 10)):
    exact = np.stack([Image.fromarray(each.numpy()).resize((width, height), Image.BILINEAR) for each in table[0]])
    for order, given in orders.items():
        found = F.interpolate(given, (height, width), mode="bilinear", antialias=True)[0].numpy()
        apart = float(abs(found - exact).max())
        print(f"height {height}, width {width}, {order}: greatest difference {apart:.2g}")
        if apart > 1e-4:
            wrong.append((height, width, order))
print("torch", torch.__version__)
assert wrong == [(3, 1, "contiguous"), (10, 1, "contiguous")], f"the behaviour has changed: wrong are {wrong}"
PY
"$work/venv/bin/python" "$work/interpolate.py"
