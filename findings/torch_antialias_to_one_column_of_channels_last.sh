#!/usr/bin/env bash
# PyTorch: antialiased interpolation of a channels-last tensor to a width of 1 is wrong on a CPU.
#
# Towers of the NaFlex kind (SigLIP 2) keep a square table of positions, (side, side, channels), and resize it to the
# grid of each image by F.interpolate(..., mode="bilinear", antialias=True). The natural view of such a table as
# (1, channels, side, side) is channels-last.
#
# Expected: the result doesn't depend on the strides of the input, up to rounding.
# What happens: with an output width of 1 and another height, the numbers are those of other places. A width of 2 is
# right, and so is the same input made contiguous. Transformers is spared by the stride of its batch axis alone.
# Why it matters to a server of vision-language models: an image one patch wide gets the positions of another place,
# without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
cat > "$work/interpolate.py" <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
table = torch.randn(5, 5, 8).view(1, 5, 5, 8).permute(0, 3, 1, 2)
assert table.is_contiguous(memory_format=torch.channels_last)
apart = {}
for size in ((3, 1), (10, 1), (10, 2), (1, 10)):
    exact, found = (
        F.interpolate(given, size, mode="bilinear", antialias=True)
        for given in (table.double().contiguous(), table)
    )
    apart[size] = float((found - exact).abs().max())
    print(f"height {size[0]}, width {size[1]}: greatest difference {apart[size]:.2g}")
print("torch", torch.__version__)
wrong = [size for size, difference in apart.items() if difference > 1e-4]
assert wrong == [(3, 1), (10, 1)], f"the behaviour has changed: wrong are {wrong}"
PY
"$work/venv/bin/python" "$work/interpolate.py"
