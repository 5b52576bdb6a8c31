#!/usr/bin/env bash
# torch 2.13 on a CPU: an image resized bilinearly has other bytes with one thread than with two.
#
# torch.nn.functional.interpolate(mode="bilinear", antialias=False) has two kernels for float32 images. Which one it takes
# depends on the number of threads (torch.set_num_threads, OMP_NUM_THREADS), and they add the four weighted neighbours in
# another order. Rounded to bytes, as torchvision and Transformers' image processors without antialiasing (Molmo 2) do,
# some thirty bytes of a million differ by 1.
# Expected: the same bytes; the image is too small for the work to be divided.
# Why it matters to a server of vision-language models: processes that prepare images are often given one thread, while
# the reference that they are compared with has all. Pixels, and hashes of pixels in cache keys, depend on it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$work/probe.py" <<'PY'
import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def resized(threads):
    torch.set_num_threads(threads)
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        height, width = torch.randint(20, 300, (2,), generator=draw).tolist()
        image = torch.randint(0, 256, (1, 3, height, width), generator=draw).float()
        made = torch.nn.functional.interpolate(image, (378, 378), mode="bilinear", align_corners=False, antialias=False)
        found.append(made.round())
    return torch.stack(found)


one, two, four = resized(1), resized(2), resized(4)
different = int((one != two).sum())
print(f"bytes that differ between 1 and 2 threads: {different} of {one.numel()}, by up to {int((one - two).abs().max())}")
print(f"between 2 and 4 threads: {int((two != four).sum())}")
assert torch.equal(two, four)
assert different > 0, "one thread gives the same bytes now"
PY
"$work/venv/bin/python" "$work/probe.py"
