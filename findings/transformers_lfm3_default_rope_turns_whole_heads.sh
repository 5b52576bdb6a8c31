#!/usr/bin/env bash
# Transformers 5.24: LFM3's rotary type "default" ignores partial_rotary_factor, which its own default config has.
#
# LFM3's layers with full attention rotate half of a head: Lfm3Config without rope_parameters makes them of the type
# "proportional" with partial_rotary_factor 0.5. NVIDIA's NeMo AutoModel documents that released LFM3 checkpoints call
# the same rotation "default", beside the same factor.
# Expected: a stated share of a head is what rotates, or the pair of fields is refused.
# What happens: with "default" all angles of a head turn, without a warning; the share is not read.
# Why it matters to a server of vision-language models: a model that was trained with half of its angles still answers
# with all of them, worse the farther apart two tokens are. Sightline reads "default" beside a share as "proportional".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
cat > "$work/angles.py" <<'PY'
import torch
import transformers


def turning(kind, **share):
    """Angles of a head, of 8, that turn in the layers with full attention."""
    ropes = {
        "full_attention": {"rope_type": kind, "rope_theta": 1e6, **share},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Lfm3Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["full_attention", "sliding_attention"],
        rope_parameters=ropes, pad_token_id=0,
    )
    with torch.device("cpu"):
        model = transformers.Lfm3ForCausalLM(config)
    return int((model.model.rotary_emb.full_attention_inv_freq != 0).sum())


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {
    "proportional, half": turning("proportional", partial_rotary_factor=0.5),
    "default, half": turning("default", partial_rotary_factor=0.5),
    "default": turning("default"),
}
for name, angles in found.items():
    print(f"{name}: {angles} of 8 angles turn")
assert list(found.values()) == [4, 8, 8], "the behaviour has changed"
PY
"$work/venv/bin/python" "$work/angles.py"
