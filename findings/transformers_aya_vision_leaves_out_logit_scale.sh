#!/usr/bin/env bash
# Transformers 5.23: Aya Vision and Command A Vision give logits that their decoder's own class multiplies by logit_scale.
#
# Cohere's configuration has a logit_scale, which belongs to Cohere2ForCausalLM. AyaVisionForConditionalGeneration and
# Cohere2VisionForConditionalGeneration take the decoder without its head, and have a head of their own that does not
# multiply.
# Expected: a text prompt gets the same logits from all three classes with the same weights.
# Those of the vision classes are 1 / logit_scale times as large, 4 with the 0.25 of Command R7B: greedy answers are the
# same, but probabilities are those of a temperature of 1/4.
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
    AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, Cohere2ForCausalLM, Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration, SiglipVisionConfig,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
text = Cohere2Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, logit_scale=0.25, bos_token_id=1, eos_token_id=2,
)
vision = SiglipVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
)
alone = Cohere2ForCausalLM(text).eval()
ids = torch.arange(3, 15)[None]
for config, cls in (
    (AyaVisionConfig(text_config=text, vision_config=vision), AyaVisionForConditionalGeneration),
    (Cohere2VisionConfig(text_config=text, vision_config=vision), Cohere2VisionForConditionalGeneration),
):
    whole = cls(config).eval()
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    whole.lm_head.load_state_dict(alone.lm_head.state_dict())
    with torch.no_grad():
        # The padding token's embedding, which the head shares, is zero.
        ratio = (whole(input_ids=ids).logits / alone(input_ids=ids).logits)[..., 1:]
    print(f"logits of {cls.__name__} over those of Cohere2ForCausalLM: {ratio.min():.4f} to {ratio.max():.4f}")
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=1e-3), "both classes multiply now"
PY
"$work/venv/bin/python" "$work/probe.py"
