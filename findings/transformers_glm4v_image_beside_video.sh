#!/usr/bin/env bash
# Transformers 5.23: GLM-4.1V refuses an image and a video in one prompt.
#
# Frames of a video and images have the same placeholder in GLM-4.1V's prompts; which is which, the caller's
# mm_token_type_ids say (1: image, 2: video).
# Expected: the rows of the image go to the placeholders of type 1, those of the video to type 2.
# The model counts all placeholders as the image's instead and raises a ValueError. Each alone works.
# Why it matters to a server of vision-language models: a conversation with an image and a video has no reference, and
# a server that calls the library refuses such a request after both were fetched and encoded.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

transformers.logging.set_verbosity(50)
print("transformers", transformers.__version__, "torch", torch.__version__)
IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END = range(60, 66)
text = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
vision = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "image_size": 56,
}
marks = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
config = Glm4vConfig(text_config=text, vision_config=vision, **marks)
torch.manual_seed(0)
model = Glm4vForConditionalGeneration(config).eval()
grid = torch.tensor([[1, 4, 4]])
pixels = torch.randn(16, 3 * 2 * 14 * 14)
image = [START, *[IMAGE] * 4, END]
video = [VIDEO_START, *image, VIDEO_END]
of_image, of_video = {"pixel_values": pixels, "image_grid_thw": grid}, {
    "pixel_values_videos": pixels,
    "video_grid_thw": grid,
}


def types(ids, kind):
    return [kind if token == IMAGE else 0 for token in ids]


def logits(ids, kinds, **media):
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            mm_token_type_ids=torch.tensor([kinds]),
            **media,
        )
    return found.logits


assert logits([5, *image, 6], [0, *types(image, 1), 0], **of_image).isfinite().all()
assert logits([5, *video, 6], [0, *types(video, 2), 0], **of_video).isfinite().all()
print("an image alone and a video alone: answered")
try:
    logits(
        [5, *image, 6, *video, 7],
        [0, *types(image, 1), 0, *types(video, 2), 0],
        **of_image,
        **of_video,
    )
except ValueError as error:
    print("both:", error)
    assert "do not match" in str(error), error
else:
    raise SystemExit("an image and a video go together now")
PY
"$work/venv/bin/python" "$work/probe.py"
