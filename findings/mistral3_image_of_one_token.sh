#!/usr/bin/env bash
# Transformers 5.23: Mistral3 fails for a prompt whose only image becomes one token.
#
# Expected: an image of 20 x 20 pixels is an image like another. The processor resizes it to 28 x 28, four patches
# of 14 pixels that merge to one token, and writes one [IMG] into the prompt.
# The model raises "split_with_sizes expects split_sizes to sum exactly to ...": it removes the first dimension of its
# features if that is 1, meaning a batch of one, and takes the number of tokens for it. The same image beside another
# one works, and so does one that is a pixel larger.
# Why it matters to a server of vision-language models: icons cut from a page or a screen are this small. A server that
# batches images hides the fault until such a request comes alone, and a test against this reference can't cover it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
image_token, patch, merge = 10, 14, 2
text = {
    "model_type": "mistral",
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
vision = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": patch,
    "image_size": 8 * patch,
}
config = transformers.Mistral3Config(
    text_config=text, vision_config=vision, image_token_index=image_token, spatial_merge_size=merge
)
model = transformers.Mistral3ForConditionalGeneration(config).eval()
print("torch", torch.__version__, "; transformers", transformers.__version__)


@torch.no_grad()
def answer(*sizes):
    """The shape of the logits for images of these heights and widths in pixels, or the error."""
    resized = [tuple(-(-side // (patch * merge)) * patch * merge for side in size) for size in sizes]
    height, width = (max(sides) for sides in zip(*resized))
    pixels = torch.randn(len(sizes), 3, height, width)
    tokens = sum(h * w for h, w in resized) // (patch * merge) ** 2
    prompt = torch.tensor([[1, *[image_token] * tokens, 2]])
    try:
        return tuple(model(input_ids=prompt, pixel_values=pixels, image_sizes=torch.tensor(resized)).logits.shape)
    except RuntimeError as error:
        return str(error)


small = (20, 20)
for sizes in ([small], [(28, 28)], [small, small], [small, (40, 60)], [(28, 29)], [(20, 40)]):
    found = answer(*sizes)
    print(*sizes, ":", found)
    alone = len(sizes) == 1 and max(sizes[0]) <= patch * merge
    assert isinstance(found, str) == alone, "an image of one token works now"
    assert not alone or found.startswith("split_with_sizes expects split_sizes to sum exactly to 48"), found
PY
"$work/venv/bin/python" "$work/probe.py"
