#!/usr/bin/env bash
# Transformers: ColQwen2 gives the patches of an image the positions of text, with which the model was not trained.
#
# ColQwen2 is a Qwen2-VL, whose rotary positions have three axes: all patches of an image share the first, and their
# rows and columns are the other two. ColQwen2ForRetrieval embeds the tokens itself and passes no ids to the model
# inside, which then can't find the images and counts all tokens one by one. Releases up to 4.57 computed the
# positions in ColQwen2ForRetrieval.
#
# Expected: the vectors of a page are those with Qwen2-VL's positions, as colpali-engine trained and uses the model.
# What happens: they are those of a text of as many tokens, without an error or a warning. Given position_ids, the
# model takes them.
# Why it matters to a server of vision-language models: vectors of pages that are indexed by one and queried by the
# other don't belong together. A server that is tested against this class must give it the positions.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/positions.py" <<'PY'
import torch
import transformers
from transformers import ColQwen2Config, ColQwen2ForRetrieval

torch.manual_seed(0)
vlm = {
    "model_type": "qwen2_vl",
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
    "image_token_id": 5,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
model = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=16)).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=1.3 / parameter[0].numel() ** 0.5)

# A grid of 8 by 12 patches is 4 by 6 tokens.
grid = torch.tensor([[1, 8, 12]])
ids = torch.tensor([[1, 3, *[5] * 24, 4, 2]])
patches = torch.randn(1, 96, 3 * 2 * 4 * 4)
arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches, "image_grid_thw": grid}
kinds = (ids == 5).int()
with torch.inference_mode():
    positions, _ = model.vlm.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)
    alone = model(**arguments).embeddings[0]
    as_text = model(**arguments, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1)).embeddings[0]
    as_image = model(**arguments, position_ids=positions).embeddings[0]

print("transformers", transformers.__version__)
print("positions of the image's last token:", positions[:, 0, 25].tolist(), "of text:", [25] * 3)
print("greatest difference from the vectors with the positions of text:", float((alone - as_text).abs().max()))
print("greatest difference from the vectors with Qwen2-VL's positions:", float((alone - as_image).abs().max()))
assert torch.equal(alone, as_text), "images have positions of their own now"
assert (alone - as_image).abs().max() > 0.01
PY
"$work/venv/bin/python" "$work/positions.py"
