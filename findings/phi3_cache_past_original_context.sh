#!/usr/bin/env bash
# Transformers 5.17: Phi-3 with longrope gives other tokens with a cache than without once an answer grows long.
#
# longrope has two sets of rotary frequencies; a sequence longer than original_max_position_embeddings uses the long
# ones. Without a cache every step computes the whole sequence with one set. With one, the keys of short frequencies
# stay when the answer grows beyond that length, and new tokens with long ones attend to them.
#
# Expected: use_cache changes the speed of greedy answers and nothing else. In 5.23.0 that is so: the sequence is
# computed again. In 5.17.0 the answers differ from the first token beyond the original context on.
# Why it matters to a server of vision-language models: prompts with images end near such lengths, and a reference
# for the same checkpoint gives another answer after an update of the library.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
original, length, new = 64, 58, 14
config = transformers.Phi3Config(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=None,
    max_position_embeddings=4 * original,
    original_max_position_embeddings=original,
    rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    initializer_range=0.5,
)
model = transformers.Phi3ForCausalLM(config).eval()
prompt = torch.randint(1, 100, (1, length))
cached, computed = (
    model.generate(prompt, max_new_tokens=new, do_sample=False, use_cache=use)[0, length:].tolist()
    for use in (True, False)
)
print("transformers", transformers.__version__, "; tokens until the original context is full:", original - length)
print("with a cache:   ", cached)
print("without a cache:", computed)
same = original - length + 1
assert cached[:same] == computed[:same]
assert cached != computed, "a cache makes no difference now"
PY
"$work/venv/bin/python" "$work/probe.py"
