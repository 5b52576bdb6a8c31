#!/usr/bin/env bash
# Transformers: Qwen2-VL's video sampler asks for a frame that the video doesn't have.
#
# Qwen2VLVideoProcessor.sample_frames, which Qwen2.5-VL uses too, computes its indices as
# torch.arange(0, total, total / count).int(). Rounding of total / count makes some of these ranges one number
# longer than `count`. The last index is then `total`, one behind the last frame.
#
# Expected: at two frames a second a clip of N frames gives indices from 0 to N - 1, as many as asked for.
# What happens: for about 1 in 200 of usual lengths there is one index more, N itself. The backends differ in what
# follows: read_video_pyav leaves the frame out, but counts its index, so that the rate that the model is told
# (sampled_fps) is too high; indexing decoded frames with it raises IndexError.
# Why it matters to a server of vision-language models: a few of many users' videos fail, or are told a wrong pace,
# by their number of frames alone.
#
# The module imports torchvision for its resizing, which isn't used here: an empty module stands in for it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy pillow==12.3.0
cat > "$work/sampled.py" <<'PY'
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import torch
import transformers
from transformers.video_utils import VideoMetadata

for part in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
    sys.modules["torchvision" + part] = ModuleType("torchvision" + part)
name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
sample = import_module(name).Qwen2VLVideoProcessor.sample_frames
options = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)

behind, tried = [], 0
for rate in (24.0, 25.0, 30.0, 50.0, 60.0):
    for total in range(100, 9000, 7):
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        indices = sample(options, metadata, fps=2)
        tried += 1
        if int(indices[-1]) >= total:
            behind.append((total, rate, len(indices), int(indices[-1])))
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"{len(behind)} of {tried} clips: an index behind the last frame")
for total, rate, count, last in behind[:5]:
    print(f"  {total} frames at {rate:g} a second: {count} indices, the last is {last}")
assert behind, "no index is behind the last frame any more"
PY
"$work/venv/bin/python" "$work/sampled.py"
