#!/usr/bin/env bash
# Pillow 13 resizes tall images by other passes than Pillow 12: the same call gives other bytes.
#
# Image.resize filters across and down, one pass after the other, and rounds to bytes in between. Up to Pillow
# 12.3 the pass across always comes first. Pillow 13.0 runs the pass down first if the height shrinks by more
# than twice as many pixels as the width. The order decides the rounding, so bytes differ.
#
# Expected: the same image, size and filter give the same bytes, as in all versions before.
# Why it matters to a server of vision-language models: pages and phone screenshots are tall. Two replicas with
# different versions prepare other pixels for one image: content hashes differ, so caches miss, and answers may
# differ. Recorded token ids of a reference hold for one version of Pillow.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pillow==12.3.0
"$work/venv/bin/pip" install -q --target "$work/new" --no-deps pillow==13.0.0
cat > "$work/resize.py" <<'PY'
import sys
import numpy as np
import PIL
from PIL import Image

generator = np.random.default_rng(0)
for size, target in [((1240, 1754), (616, 868)), ((1170, 2532), (616, 1344)), ((640, 480), (616, 476))]:
    # Smooth, as a photograph, with a little noise.
    y, x = np.mgrid[: size[1], : size[0]]
    wave = 127 + 60 * np.sin(x / 17) + 50 * np.cos(y / 23)
    noise = generator.normal(0, 4, (size[1], size[0], 3))
    image = Image.fromarray(np.clip(wave[..., None] + noise, 0, 255).astype(np.uint8))
    np.save(f"{sys.argv[1]}-{size[0]}x{size[1]}.npy", np.asarray(image.resize(target, Image.Resampling.BICUBIC)))
print("Pillow", PIL.__version__)
PY
"$work/venv/bin/python" "$work/resize.py" "$work/old"
PYTHONPATH="$work/new" "$work/venv/bin/python" "$work/resize.py" "$work/recent"
"$work/venv/bin/python" - "$work" <<'PY'
import sys
import numpy as np

shares = {}
for name in ("1240x1754", "1170x2532", "640x480"):
    old, new = (np.load(f"{sys.argv[1]}/{kind}-{name}.npy").astype(int) for kind in ("old", "recent"))
    shares[name] = (old != new).mean()
    print(f"{name}: {shares[name]:.2%} of the bytes differ, by at most {abs(old - new).max()}")
assert shares["1170x2532"] > 0, "Pillow 13 gives the bytes of Pillow 12 again"
assert shares["640x480"] == 0
PY
