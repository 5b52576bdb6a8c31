#!/usr/bin/env bash
# Transformers 5.23: Molmo 2's processor writes other times for the same frames, depending on who chose them.
#
# The time of a frame is its index divided by the video's rate, to a tenth of a second. Indices that the processor chose
# itself are a tensor, so the quotient is a float32; those that a caller states are a list of int, as VideoMetadata
# declares it, and it is a float64. Of a time with five hundredths, as 1.55 s, the two may be rounded differently.
# Expected: the same frames of the same video make the same prompt.
# Here a video of 2000 frames at 60 a second is given whole, under the processor's defaults, and once more as the very
# 64 frames that it chose, with their indices. The frames are equal, the prompts are not: frame 93 (1.55 s) has 1.5 in
# one and 1.6 in the other.
# Why it matters to a server of vision-language models: one that chooses frames while it decodes, and states the
# indices, sends other prompts than the library does alone. Answers about when something happens build on these times.
# Both steps below are the processor's own. What lies between them, resizing by torchvision, is left out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 pillow==12.0.0 numpy
cat > "$work/probe.py" <<'PY'
import re
import sys
from functools import partial
from types import ModuleType

import torch
import transformers

for part in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
    sys.modules["torchvision" + part] = ModuleType("torchvision" + part)
functional = sys.modules["torchvision.transforms.v2.functional"]
sys.modules["torchvision.transforms.v2"].functional = functional
functional.InterpolationMode = int  # of an annotation
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata

print("transformers", transformers.__version__, "torch", torch.__version__)
COUNT, RATE = 2000, 60
frames, texts = object.__new__(Molmo2VideoProcessor), object.__new__(Molmo2Processor)
texts.use_frame_special_tokens, texts.video_use_col_tokens = True, False


def shown(video, **stated):
    """The frames that are shown, their indices, and the times in front of them."""
    metadata = VideoMetadata(total_num_frames=COUNT, fps=RATE, duration=COUNT / RATE, **stated)
    sample = None if stated else partial(frames.sample_frames, num_frames=frames.num_frames, max_fps=frames.max_fps)
    (video,), found = frames._decode_and_sample_videos([video], [metadata], not stated, sample)
    grids = torch.tensor([[len(video), 9, 9]])
    prompt = texts.replace_video_token({"video_grids": grids, "video_metadata": found}, 0)
    return video, found[0].frames_indices, re.findall(r"([\d.]+) <frame_start>", prompt)


whole = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
video, indices, times = shown(whole)
indices = indices.tolist()
same_video, same_indices, other_times = shown(whole[indices], frames_indices=indices)
assert torch.equal(video, same_video) and indices == same_indices and len(times) == len(other_times) == 64
differ = {index: (own, told) for index, own, told in zip(indices, times, other_times) if own != told}
for index, (own, told) in differ.items():
    print(f"frame {index}, {index / RATE:.2f} s: {own} where the processor chose it, {told} where it is told")
print(f"{len(differ)} of {len(indices)} times differ; the frames are the same")
assert differ[93] in (("1.5", "1.6"), ("1.6", "1.5"))
PY
"$work/venv/bin/python" "$work/probe.py"
