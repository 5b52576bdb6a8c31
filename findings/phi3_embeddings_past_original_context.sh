#!/usr/bin/env bash
# Transformers: Phi-3 with longrope answers differently to token ids and to the same prompt as inputs_embeds.
#
# longrope has two sets of rotary frequencies, and a sequence longer than original_max_position_embeddings uses
# the long ones. Keys in the cache were computed with the short ones, so Phi-3 computes the whole sequence again
# when an answer grows beyond that length. It looks at the length of input_ids for that. With inputs_embeds
# these hold the answer alone: the switch is missed, and new tokens with long frequencies attend to keys with
# short ones.
#
# Expected: the embeddings of a prompt give the tokens that its ids give. They do until the sequence has
# original_max_position_embeddings tokens; from there on they differ. Without a cache, ids give the same tokens.
# Why it matters to a server of vision-language models: Phi-3.5-vision and models like it hand images to the
# language model as inputs_embeds, so whoever compares with `generate` compares with the wrong half.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/phi3.py" <<'PY'
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
    max_position_embeddings=512,
    original_max_position_embeddings=original,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": original,
    },
    pad_token_id=0,
    initializer_range=0.3,
)
model = transformers.Phi3ForCausalLM(config).eval()
ids = torch.randint(1, 100, (1, length))
options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": 1000}
options["attention_mask"] = torch.ones_like(ids)
with torch.inference_mode():
    cached = model.generate(ids, **options)[0, length:].tolist()
    uncached = model.generate(ids, use_cache=False, **options)[0, length:].tolist()
    embeds = model.get_input_embeddings()(ids)
    embedded = model.generate(inputs_embeds=embeds, **options)[0].tolist()
print("transformers", transformers.__version__)
print("ids               ", cached)
print("ids, no cache     ", uncached)
print("the same as embeds", embedded)
# The last token of the short frequencies is the one that makes the sequence longer than the original context.
within = original - length + 1
assert cached == uncached
assert embedded[:within] == cached[:within]
assert embedded != cached, "embeddings and ids agree now"
PY
"$work/venv/bin/python" "$work/phi3.py"
