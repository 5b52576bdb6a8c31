#!/usr/bin/env bash
# Transformers: bad_words_ids with the end token alone is dropped without a word.
#
# Expected: generate(bad_words_ids=[[2]]) never gives token 2, as it never gives token 3 for [[3]]; or it is refused.
# A list that holds only the end token is taken out. The end stays as likely as before.
# Why it matters to a server of vision-language models: generation_config.json is read by servers too. One that
# forbids what the file forbids gives longer answers than the reference does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=20,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    eos_token_id=2,
)
model = transformers.LlamaForCausalLM(config).eval()


def forbidden(bad_words_ids):
    made = model.generate(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        bad_words_ids=bad_words_ids,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.where(made.scores[0][0] == -float("inf"))[0].tolist()


print("transformers", transformers.__version__, "; the end token is 2")
for words in ([[3]], [[2]], [[2], [3]]):
    print("bad_words_ids", words, "forbid", forbidden(words))
assert forbidden([[3]]) == [3]
assert forbidden([[2]]) == [] and forbidden([[2], [3]]) == [3], "the end token is forbidden now"
PY
"$work/venv/bin/python" "$work/probe.py"
