#!/usr/bin/env bash
# Transformers 5.23: a Llama whose config.json names a sliding_window answers otherwise with a cache than without one.
#
# Llama's attention has no sliding window, and its class does not declare the field. A file may have it all the same:
# one that was made of a Mistral's, by naming Llama as its architecture, keeps "sliding_window": 4096.
#
# Expected: the field counts for nothing, or for attention as a whole. Either way a cache changes no token.
# What happens: attention ignores the field, but the cache that generate() makes reads it and drops all keys but the
# last ones. The first token, which the whole prompt gives, is the same; the next ones are another model's. There is
# no error and no warning. The classes of Qwen3-VL and GLM-4.1V do the same with their text_config.
# Why it matters to a server of vision-language models: LLaVA and others take a Llama of any origin. Answers longer
# than the window are compared with generate(), which is at odds with its own forward pass; a server that is right
# differs from one and agrees with the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/window.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT, WINDOW, STEPS = 20, 8, 8


def answers(**fields):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=None,
        **fields,
    )
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    prompt = torch.randint(3, 64, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    greedy = {"do_sample": False, "max_new_tokens": STEPS, "attention_mask": torch.ones_like(prompt)}
    found = [model.generate(prompt, use_cache=cached, **greedy)[0, PROMPT:].tolist() for cached in (True, False)]
    logits = model(prompt).logits
    return *found, logits


cached, whole, logits = answers()
print("transformers", transformers.__version__)
print("no window in config.json: with a cache", cached, "without", whole)
assert cached == whole
cut, still_whole, same_logits = answers(sliding_window=WINDOW)
print(f"sliding_window {WINDOW}:       with a cache", cut, "without", still_whole)
assert torch.equal(logits, same_logits), "attention reads the field now"
assert still_whole == whole
assert cut != whole, "the cache ignores the field now"
assert cut[0] == whole[0], "the first token comes from the whole prompt"
PY
"$work/venv/bin/python" "$work/window.py"
