#!/usr/bin/env bash
# Transformers 5.23: HunyuanOCR's class rotates the two numbers of a pair by positions of different axes.
#
# mrope_section ([16, 16, 16, 16] in the public file) gives each of four axes a share of the angles: index, column,
# line, number of the image. A rotary embedding turns pairs of a head's numbers, i and i + 64 of 128, each by one angle.
# Expected: angles 0 to 15 take their position from the first axis, for both numbers of their pairs. The model's first
# code does so: it splits cos and sin (128 wide) by the list of sections repeated, [16, 16, 16, 16] * 2. So do vLLM's
# first class of it and llama.cpp.
# The class doubles each section instead: [32, 32, 32, 32]. The first axis has the first numbers of 32 pairs, and the
# second numbers of these turn by the third axis. Text has one position on all axes and is the same. For
# image tokens the axes differ, so a pair is no longer rotated: its length changes.
# Why it matters to a server of vision-language models: images are told apart from text by these positions alone, and a
# server that is right in them gives other logits than the reference.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers
from transformers.models.hunyuan_vl import modeling_hunyuan_vl as module

print("transformers", transformers.__version__)
rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0, "mrope_section": [16] * 4}
config = module.HunYuanVLTextConfig(hidden_size=128, num_attention_heads=1, head_dim=128, rope_parameters=rope)
embedding = module.HunYuanVLRotaryEmbedding(config)
query = torch.randn(1, 1, 1, 128, generator=torch.Generator().manual_seed(0))


def lengths(position):
    """The longest change of a pair's length when it rotates, and the pairs whose two numbers share their cosine."""
    cos, sin = embedding(query, torch.tensor(position)[:, None, None])
    turned, _ = module.apply_rotary_pos_emb(query, query, cos, sin)
    before, after = (x[0, 0, 0].view(2, 64).norm(dim=0) for x in (query, turned))
    same = (cos[0, 0, :64] == cos[0, 0, 64:]).sum()
    return float((after / before - 1).abs().max()), int(same)


text, image = lengths([70, 70, 70, 70]), lengths([70, 5, 3, 0])
print(f"text:  lengths of pairs change by up to {text[0]:.1%}; {text[1]} of 64 pairs have one cosine")
print(f"image: lengths of pairs change by up to {image[0]:.1%}; {image[1]} of 64 pairs have one cosine")
assert text[0] < 1e-4 and text[1] == 64
assert image[0] > 0.1 and image[1] < 32, "pairs rotate by one axis now"
PY
"$work/venv/bin/python" "$work/probe.py"
