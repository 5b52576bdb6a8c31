#!/usr/bin/env bash
# Transformers 5.23: dequantising an fp8 checkpoint multiplies by wrong scales where the last block is cut.
#
# Expected: weight_block_size [128, 128] says which scale a weight has: row 127 is of the first block, row 128 of the
# second. A matrix of 576 rows has 4 blocks and one of 64 rows.
# FineGrainedFP8Config(dequantize=True) divides the rows by the number of scales instead. If that leaves a remainder,
# the checkpoint is refused (576 rows, 5 scales). If it doesn't, the blocks are smaller and the weights wrong, without
# an error or warning: 960 rows have 8 scales and are taken for 8 blocks of 120.
# Why it matters to a server of vision-language models: such sizes are common (960 is the width of SmolLM2-360M, 576 the
# rows of DeepSeek-V3's kv_a_proj). On a machine without a GPU for fp8 this is how the library loads any fp8 checkpoint,
# so a reference made there is wrong, or there is none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy
cat > "$work/probe.py" <<'PY'
import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity(50)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
block = 128


def quantised(weight):
    """``weight`` in fp8, a scale for each block, and each element's own scale."""
    rows, columns = weight.shape
    grid = -(-rows // block), -(-columns // block)
    scales = 1.0 + (torch.arange(grid[0])[:, None] + torch.arange(grid[1])) % 2
    own = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (weight / own).to(torch.float8_e4m3fn), scales, own


def largest_error(rows, folder):
    """The largest error of a loaded weight of ``rows`` rows, relative to its largest element."""
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=rows,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        fp8, scales, own = quantised(weights[name])
        weights |= {name: fp8, name + "_scale_inv": scales}
        if "gate_proj" in name:
            checked, expected = name, fp8.float() * own
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(settings))
    dequantise = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dequantise)
    return ((model.state_dict()[checked] - expected).abs().max() / expected.abs().max()).item()


print("torch", torch.__version__, "; transformers", transformers.__version__)
found = {}
for rows in (1024, 960, 192, 576):
    with tempfile.TemporaryDirectory() as folder:
        try:
            found[rows] = largest_error(rows, Path(folder))
            print(rows, "rows: largest error", round(found[rows], 3), "of the largest weight")
        except RuntimeError as error:
            found[rows] = str(error)
            print(rows, "rows: refused:", found[rows].split(".")[0])
assert found[1024] < 1e-6
assert all(isinstance(found[rows], float) and found[rows] > 0.2 for rows in (960, 192)), "cut blocks are right now"
assert "conversion of the weights" in str(found[576]), "576 rows are taken now"
PY
"$work/venv/bin/python" "$work/probe.py"
