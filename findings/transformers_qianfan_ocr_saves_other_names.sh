#!/usr/bin/env bash
# Transformers 5.23: a Qianfan-OCR that was loaded and saved has tensors of other names than the one that was loaded.
#
# The published files name the decoder's layers language_model.model.layers.N, and the tower's
# vision_model.encoder.layers.N. Transformers' model calls both just "layers", and a table of renamings leads from one
# to the other, which saving goes through backwards.
#
# Expected: save_pretrained writes the names of the file that from_pretrained has read.
# What happens: backwards "layers" becomes "encoder.layers", in the decoder as well: its tensors are saved as
# language_model.model.encoder.layers.N, which no published file has. Transformers itself reads them again.
# Why it matters to a server of vision-language models: whoever fine-tunes the model and saves it has a file whose decoder
# other programs don't find, as none of them goes through that table. A server has to know both names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/names.py" <<'PY'
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
tower = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": [24, 24],
    "patch_size": [6, 6],
}
text = {
    "model_type": "qwen3",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
config = transformers.QianfanOCRConfig(vision_config=tower, text_config=text, image_token_id=5)
made = transformers.QianfanOCRForConditionalGeneration(config)
made.save_pretrained(folder / "first")


def layers(path):
    """The names of the norms before attention, of decoder and tower."""
    names = load_file(path / "model.safetensors")
    return sorted(name for name in names if re.search(r"layers\.0\.(input_layernorm|norm1)\.weight", name))


# A file with the names of the published one.
(folder / "published").mkdir()
made.config.save_pretrained(folder / "published")
tensors = load_file(folder / "first" / "model.safetensors")
tensors = {name.replace("language_model.model.encoder.", "language_model.model."): tensor for name, tensor in tensors.items()}
save_file(tensors, folder / "published" / "model.safetensors", metadata={"format": "pt"})
model, report = transformers.QianfanOCRForConditionalGeneration.from_pretrained(
    folder / "published", output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"]
for (name, one), (_, other) in zip(made.named_parameters(), model.named_parameters(), strict=True):
    assert torch.equal(one, other), name
model.save_pretrained(folder / "saved")
print("transformers", transformers.__version__)
print("read: ", ", ".join(layers(folder / "published")))
print("saved:", ", ".join(layers(folder / "saved")))
norm, tower = "layers.0.input_layernorm.weight", "vision_model.encoder.layers.0.norm1.weight"
assert layers(folder / "published") == ["language_model.model." + norm, tower]
assert layers(folder / "saved") == ["language_model.model.encoder." + norm, tower], "it saves the names that it read"
PY
"$work/venv/bin/python" "$work/names.py" "$work"
