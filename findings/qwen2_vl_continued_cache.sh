#!/usr/bin/env bash
# Transformers: Qwen2-VL continued from its own cache after a long video gives other tokens than in one call.
#
# The positions of Qwen2-VL go on from the last token of the prompt, and `generate` does that within one call.
# But get_rope_index returns as `rope_deltas` the greatest position + 1 - length, and a call with
# past_key_values counts on from that. After a video with more steps in time than merged rows, and little text
# behind it, the greatest position is the video's last step, not the last token. Qwen2.5-VL does the same.
#
# Expected: 4 tokens, then 4 more from the returned past_key_values, are the 8 tokens of one call. A recompute
# without the cache agrees with the one call.
# Why it matters to a server of vision-language models: engines that take rope_deltas as the offset of an
# answer's positions (it looks made for that) answer long videos wrongly from the second token on, and cached
# turns differ from computed ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/continued.py" <<'PY'
import torch
import transformers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

torch.manual_seed(0)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "pad_token_id": 0}
vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=3 * parameter[0].numel() ** -0.5)

steps = 60
ids = torch.tensor([[5, 58, *[61] * steps, 59, 7, 8, 9]])
types = (ids == 61).int() * 2
video = {
    "pixel_values_videos": torch.randn(steps * 4, 3 * 2 * 4 * 4),
    "video_grid_thw": torch.tensor([[steps, 2, 2]]),
}
options = {"do_sample": False, "eos_token_id": 1000, "pad_token_id": 0, "return_dict_in_generate": True}
with torch.inference_mode():
    positions, delta = model.model.get_rope_index(ids, types, video_grid_thw=video["video_grid_thw"])
    print("the last token's position is", positions[:, 0, -1].tolist())
    print("by rope_deltas the next token's position is", ids.shape[1] + int(delta))
    one = model.generate(input_ids=ids, mm_token_type_ids=types, **video, max_new_tokens=8, **options)
    first = model.generate(input_ids=ids, mm_token_type_ids=types, **video, max_new_tokens=4, **options)
    so_far = first.sequences
    continued = model.generate(
        input_ids=so_far,
        past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(so_far),
        max_new_tokens=4,
        **options,
    )
    types = torch.nn.functional.pad(types, (0, 4))
    again = model.generate(input_ids=so_far, mm_token_type_ids=types, **video, max_new_tokens=4, **options)
one, continued, again = (found.sequences[0, -8:].tolist() for found in (one, continued, again))
print("transformers", transformers.__version__)
print("one call               ", one)
print("continued from cache   ", continued)
print("recomputed, then 4 more", again)
assert one == again
assert one != continued, "continuing from the cache agrees with one call now"
PY
"$work/venv/bin/python" "$work/continued.py"
