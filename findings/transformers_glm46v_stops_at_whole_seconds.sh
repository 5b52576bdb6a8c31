#!/usr/bin/env bash
# Transformers 5.23: GLM-4.6V is shown no frame behind the last whole second of a short video.
#
# Its sampler walks over the frames until the time reaches int(duration), then spreads the number of frames that the
# duration asks for between the first and the last frame that it has found.
# Expected: frames from the whole clip, about six a second.
# Of a clip of 1.9 s at 30 frames per second it takes twelve frames, all from the first second. A clip of 0.13 s has none.
# Why it matters to a server of vision-language models: what happens at the end of a short clip can't be in the answer;
# and whoever writes the sampler anew "as it is meant" gets other frames than the library, and other answers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy pillow
cat > "$work/probe.py" <<'PY'
import sys
from types import ModuleType

import torch
import transformers

# The sampler uses nothing of torchvision, which its module imports for resizing.
for part in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
    sys.modules["torchvision" + part] = ModuleType("torchvision" + part)
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
from transformers.video_utils import VideoMetadata

print("transformers", transformers.__version__, "torch", torch.__version__)
processor = object.__new__(Glm46VVideoProcessor)
processor.temporal_patch_size = Glm46VVideoProcessor.temporal_patch_size
last = {}
for frames in (4, 57, 87):
    metadata = VideoMetadata(total_num_frames=frames, fps=30, duration=frames / 30)
    chosen = [int(index) for index in processor.sample_frames(metadata)]
    last[frames] = max(chosen, default=None)
    print(f"{frames / 30:.2f} s, frames 0 to {frames - 1}: chosen {chosen}")
assert last[4] is None, "a clip of 0.13 s has frames now"
assert last[57] <= 30, "the second half of a clip of 1.9 s is seen now"
assert last[87] < 60, "the end of a clip of 2.9 s is seen now"
PY
"$work/venv/bin/python" "$work/probe.py"
