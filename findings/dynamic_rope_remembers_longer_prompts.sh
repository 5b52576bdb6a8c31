#!/usr/bin/env bash
# Transformers: with dynamic (NTK) rotary scaling a prompt's logits depend on the prompts before it.
#
# Frequencies are lowered by the length of a sequence that is longer than max_position_embeddings. The model
# keeps those of the longest sequence that it has seen, and goes back only for one shorter than
# max_position_embeddings. So a prompt between the two lengths gets the frequencies of an earlier, longer one.
#
# Expected: a model without a cache gives the same logits for the same prompt, whatever it has computed before.
# It doesn't: the second time they differ by as much as those of another prompt.
# Why it matters to a server of vision-language models: prompts with images are long, and a reference computed
# in one process, one prompt after the other, is right for the first of them only. An engine that batches
# requests must define the frequencies per request.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/dynamic.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    initializer_range=0.3,
)
model = transformers.LlamaForCausalLM(config).eval()
prompt, longer, short = (torch.randint(1, 100, (1, length)) for length in (80, 200, 20))
with torch.inference_mode():
    first = model(prompt, use_cache=False).logits
    model(longer, use_cache=False)
    second = model(prompt, use_cache=False).logits
    model(short, use_cache=False)
    third = model(prompt, use_cache=False).logits
print("transformers", transformers.__version__)
print("after a longer prompt the logits differ by", float((first - second).abs().max()))
print("and after a short one by", float((first - third).abs().max()))
assert torch.equal(first, third)
assert not torch.allclose(first, second, atol=0.1), "the order of prompts makes no difference now"
PY
"$work/venv/bin/python" "$work/dynamic.py"
