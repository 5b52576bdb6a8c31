#!/usr/bin/env bash
# Transformers 5.23 and 4.57: one checkpoint, two models, if config.json ties embeddings and a head is stored as well.
#
# With "tie_word_embeddings": true the matrix before the logits is that of the embeddings. Fine-tuning may train the
# two apart and leave the field as it was: the file then holds an lm_head.weight with other values.
#
# Expected: the field decides, and a stored head counts for nothing; that is what release 4.57 does, in silence.
# What happens: release 5.23 compares the two tensors. With other values it uses the stored head, against config.json,
# and says so in a warning. The same file gives other tokens than in release 4.57.
# Why it matters to a server of vision-language models: the small Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, SmolVLM and
# Gemma 3 tie their embeddings. A server that drops lm_head.weight by the field serves another model than today's
# Transformers, with fluent answers; headers alone don't tell, the tensors' values have to be compared.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/tied.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder, decides = Path(sys.argv[1]), sys.argv[2]
file = folder / "model.safetensors"
if not file.exists():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).clone()
    save_file(tensors, file, metadata={"format": "pt"})
stored = load_file(file)
model = LlamaForCausalLM.from_pretrained(folder).eval()
assert model.config.tie_word_embeddings
with torch.inference_mode():
    token = int(model(torch.arange(3, 20)[None]).logits[0, -1].argmax())
uses = [name for name, tensor in stored.items() if tensor.shape == (64, 32) and torch.equal(tensor, model.lm_head.weight)]
print("transformers", transformers.__version__, "computes logits with", uses, "and goes on with token", token)
assert uses == [decides], "it was " + decides
PY
mkdir "$work/model"
"$work/venv/bin/python" "$work/tied.py" "$work/model" lm_head.weight
"$work/venv/bin/pip" install -q transformers==4.57.1
"$work/venv/bin/python" "$work/tied.py" "$work/model" model.embed_tokens.weight
