#!/usr/bin/env bash
# Transformers 5.23's Gemma 4 unified sees other images with a static cache than without: its masks differ.
#
# In Gemma 4, tokens of an image attend to each other both ways in the layers with a window alone, and within the window.
# Gemma4Model makes such masks. Gemma4UnifiedModel makes them only where generate() prepares masks beforehand, which it does
# for static caches; its own forward pass, and generate() with the usual cache, open the layers with full attention too, and
# let the tokens of an image see each other beyond the window.
# Expected: the same logits for one prompt and one image, whichever cache is used, and the same masks as Gemma4Model.
# Why it matters to a server of vision-language models: two references for one checkpoint give different answers, and only one
# of them is how the model was trained (huggingface/transformers#46711 says so of Gemma 4, where it was mended).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers

print("transformers", transformers.__version__)
torch.manual_seed(0)
IMAGE, ROWS = 9, 6
text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
vision = {"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 8}
config = transformers.Gemma4UnifiedConfig(
    text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=10, audio_token_id=11
)
model = transformers.Gemma4UnifiedForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.5)
ids = torch.tensor([[2, 5, *[IMAGE] * ROWS, 6, 7]])
types = (ids == IMAGE).long()
given = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "mm_token_type_ids": types,
    "pixel_values": torch.rand(1, ROWS, 12),
    "image_position_ids": torch.stack([torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.long)], dim=-1)[None],
}
asked = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
with torch.inference_mode():
    forward = model(**given).logits[0, -1]
    usual = model.generate(**given, **asked).logits[0][0]
    static = model.generate(**given, **asked, cache_implementation="static").logits[0][0]
    masks = model.create_masks_for_generate(
        config=config, inputs_embeds=torch.empty(*ids.shape, 0), attention_mask=given["attention_mask"],
        past_key_values=None, position_ids=torch.arange(ids.shape[1])[None], mm_token_type_ids=types,
    )
    masked = model(**{**given, "attention_mask": masks}).logits[0, -1]
print(f"forward pass and generate() with its usual cache differ by {(forward - usual).abs().max():.4f}")
print(f"generate() with the usual and with a static cache differ by {(usual - static).abs().max():.4f}")
print(f"a static cache and the masks of create_masks_for_generate() differ by {(static - masked).abs().max():.4f}")
assert torch.allclose(forward, usual, atol=1e-4) and torch.allclose(static, masked, atol=1e-4)
assert (usual - static).abs().max() > 0.1, "the masks are the same now"
PY
"$work/venv/bin/python" "$work/probe.py"
