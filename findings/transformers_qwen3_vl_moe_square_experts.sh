#!/usr/bin/env bash
# Transformers 5.23: a Qwen3-VL-MoE in its public layout is read wrongly if the experts' matrices are square.
#
# Public checkpoints store the experts' first matrices as (experts, hidden, 2 * intermediate). The library keeps them
# with the last two axes swapped. Whether a file needs the swap, it tells by the shape alone.
# Expected: the layout does not depend on the sizes, so a model loads rightly with any sizes, or loading fails.
# With hidden = 2 * intermediate both layouts have one shape: the weights stay as they are, without an error or a
# warning, and the logits are others.
# Why it matters to a server of vision-language models: 2048 and 1024 are sizes that such models may well have. A
# reference made by the library is then wrong, and so is whatever is compared with it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

transformers.logging.set_verbosity(50)
transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
HIDDEN = 64


def config(intermediate):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {
        "vocab_size": 70,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    marks = {"image_token_id": 66, "video_token_id": 67, "vision_start_token_id": 68, "vision_end_token_id": 69}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **marks)


def largest_difference(intermediate):
    torch.manual_seed(1)
    model = Qwen3VLMoeForConditionalGeneration(config(intermediate)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        public = {
            name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
        }
        assert any(".experts." in name for name in public)
        save_file(public, file, metadata={"format": "pt"})
        again = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        return float((model(ids).logits - again(ids).logits).abs().max())


other, square = largest_difference(HIDDEN // 2 - 8), largest_difference(HIDDEN // 2)
print(f"hidden {HIDDEN}: largest difference of the logits {other:.2g} with experts of 24, {square:.2g} with 32")
assert other < 1e-4 and square > 0.1, "square matrices are read in another way now"
PY
"$work/venv/bin/python" "$work/probe.py"
