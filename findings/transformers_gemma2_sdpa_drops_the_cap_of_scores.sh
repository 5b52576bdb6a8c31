#!/usr/bin/env bash
# Transformers 5.17: Gemma 2 computes attention without its cap of scores, unless the caller asks for "eager".
#
# Gemma 2's config.json has "attn_logit_softcapping": 50, with which the model was trained: each score s of attention
# becomes 50 * tanh(s / 50). PyTorch's scaled_dot_product_attention has no such cap, and Transformers 5.17 chooses it
# for Gemma 2 by default. Release 5.23 chooses "eager" for this class, which computes the cap.
#
# Expected: a model loaded without further options computes what its config.json says.
# What happens: 5.17 leaves the cap out, without an error or a warning. 5.23 gives the values of "eager".
# Why it matters to a server of vision-language models: PaliGemma 2 and others have this decoder. A server that is
# compared with the class of one release agrees, and with the other it doesn't; the fault is in the reference.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0
cat > "$work/cap.py" <<'PY'
import sys

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

sizes = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": None,
}


def log_probabilities(cap, **options):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM._from_config(Gemma2Config(**sizes, attn_logit_softcapping=cap), **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.3 / parameter[0].numel() ** 0.5)
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits.log_softmax(-1), model.config._attn_implementation


default, chosen = log_probabilities(0.5)
eager, _ = log_probabilities(0.5, attn_implementation="eager")
without, _ = log_probabilities(None, attn_implementation="eager")
print("transformers", transformers.__version__, "chooses", chosen)
print("greatest distance of the default from eager, with the cap:", float((default - eager).abs().max()))
print("greatest distance of the default from eager, without a cap:", float((default - without).abs().max()))
assert (eager - without).abs().max() > 0.05, "the cap makes no difference to this model"
if sys.argv[1] == "dropped":
    assert (default - without).abs().max() < 1e-4, "the cap is computed now"
else:
    assert (default - eager).abs().max() < 1e-4, "the cap is left out again"
PY
"$work/venv/bin/python" "$work/cap.py" dropped
"$work/venv/bin/pip" install -q transformers==5.23.0
"$work/venv/bin/python" "$work/cap.py" computed
