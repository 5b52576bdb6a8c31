#!/usr/bin/env bash
# Transformers 5.23: vision classes leave out the factor by which their decoder's own class scales its logits.
#
# Granite's configuration has a logits_scaling, by which GraniteForCausalLM divides, and Cohere's has a logit_scale, by
# which Cohere2ForCausalLM multiplies. LlavaNextForConditionalGeneration, AyaVisionForConditionalGeneration and
# Cohere2VisionForConditionalGeneration take the decoder without its head, and have a head of their own that does neither.
# Expected: a text prompt gets the same logits from the vision class and from the decoder's class with the same weights.
# With the 8 of the public Granite Vision checkpoints they are 8 times as large, with the 0.25 of Command R7B 4 times:
# greedy answers are the same, but probabilities are those of a temperature of 1/8 and 1/4.
# Why it matters to a server of vision-language models: temperature, top_p and logprobs of these models have another
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
    AyaVisionConfig, AyaVisionForConditionalGeneration, CLIPVisionConfig, Cohere2Config, Cohere2ForCausalLM,
    Cohere2VisionConfig, Cohere2VisionForConditionalGeneration, GraniteConfig, GraniteForCausalLM, LlavaNextConfig,
    LlavaNextForConditionalGeneration, SiglipVisionConfig,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)
seen = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
granite = GraniteConfig(**sizes, logits_scaling=8.0)
cohere = Cohere2Config(**sizes, logit_scale=0.25, bos_token_id=1, eos_token_id=2)
clip, siglip = CLIPVisionConfig(**seen), SiglipVisionConfig(**seen)
ids = torch.arange(3, 15)[None]
for config, cls, own, factor in (
    (
        LlavaNextConfig(text_config=granite, vision_config=clip, image_token_index=63, tie_word_embeddings=False),
        LlavaNextForConditionalGeneration, GraniteForCausalLM, 8.0,
    ),
    (
        AyaVisionConfig(text_config=cohere, vision_config=siglip, tie_word_embeddings=False),
        AyaVisionForConditionalGeneration, Cohere2ForCausalLM, 4.0,
    ),
    (
        Cohere2VisionConfig(text_config=cohere, vision_config=siglip, tie_word_embeddings=False),
        Cohere2VisionForConditionalGeneration, Cohere2ForCausalLM, 4.0,
    ),
):
    whole, alone = cls(config).eval(), own(config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        ratio = whole(input_ids=ids).logits / alone(input_ids=ids).logits
    print(f"logits of {cls.__name__} over those of {own.__name__}: {ratio.min():.4f} to {ratio.max():.4f}")
    assert torch.allclose(ratio, torch.full_like(ratio, factor), rtol=1e-3), "both classes scale now"
PY
"$work/venv/bin/python" "$work/probe.py"
