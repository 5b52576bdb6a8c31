#!/usr/bin/env bash
# Transformers: Phi3Config takes the rope types longrope and yarn, and fails for "su", the one in public files.
#
# Expected: rope_scaling with type "su", as in the config.json of Phi-3.5-vision, Phi-3-mini-128k and their finetunes,
# means longrope, and original_max_position_embeddings stands beside it, as it does in these files.
# KeyError: the field is said to be missing, though it is there. With "longrope" or "yarn" the same fields are taken.
# Why it matters to a server of vision-language models: Phi-3.5-vision's language model is a Phi-3. Whoever builds a
# reference for it from its own config.json has to rename the type first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import transformers


def take(rope_type):
    try:
        config = transformers.Phi3Config(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=128,
            original_max_position_embeddings=64,
            rope_scaling={"type": rope_type, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        )
    except KeyError as error:
        return f"KeyError: {error}"
    return config.rope_parameters["rope_type"]


print("transformers", transformers.__version__)
for name in ("longrope", "yarn", "su"):
    print(name, "is", take(name))
assert take("longrope") == take("yarn") == "longrope"
assert "original_max_position_embeddings" in take("su"), "su is taken now"
PY
"$work/venv/bin/python" "$work/probe.py"
