#!/usr/bin/env bash
# Transformers 5.23: LLaVA-NeXT with a Granite decoder gives logits that Granite's own class divides by logits_scaling.
#
# Granite's configuration has four multipliers. Three of them belong to its layers and embeddings, and the fourth,
# logits_scaling, to GraniteForCausalLM. LlavaNextForConditionalGeneration takes the decoder without its head, and has a
# head of its own that does not divide.
# Expected: a text prompt gets the same logits from both classes with the same weights.
# They are logits_scaling times as large, 8 in the public Granite Vision checkpoints: greedy answers are the same, but
# probabilities are those of a temperature of 1/8, so sampled answers hardly vary and log-probabilities are near 0.
# Why it matters to a server of vision-language models: temperature, top_p and logprobs of Granite Vision have another
# meaning with the reference than with a server that follows the decoder's configuration.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers
from transformers import (
    CLIPVisionConfig, GraniteConfig, GraniteForCausalLM, LlavaNextConfig, LlavaNextForConditionalGeneration,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
text = GraniteConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, logits_scaling=8.0, tie_word_embeddings=False,
)
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
)
whole = LlavaNextForConditionalGeneration(
    LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=63, tie_word_embeddings=False)
).eval()
alone = GraniteForCausalLM(text).eval()
alone.model.load_state_dict(whole.model.language_model.state_dict())
alone.lm_head.load_state_dict(whole.lm_head.state_dict())
ids = torch.arange(1, 13)[None]
with torch.no_grad():
    ratio = whole(input_ids=ids).logits / alone(input_ids=ids).logits
print(f"logits of LLaVA-NeXT over those of Granite: {ratio.min():.4f} to {ratio.max():.4f}")
assert torch.allclose(ratio, torch.full_like(ratio, 8.0), rtol=1e-3), "both classes divide now"
PY
"$work/venv/bin/python" "$work/probe.py"
