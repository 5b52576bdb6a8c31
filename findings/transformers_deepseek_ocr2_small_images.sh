#!/usr/bin/env bash
# Transformers 5.23: DeepSeek-OCR 2 fails for crop_to_patches=False, an option of its own processor.
#
# Without crops the image processor shows the whole image at tile_size (768 pixels) instead of size (1024). Its
# processor writes the tokens of size all the same: 256 and a separator, where the model makes 144 and that one.
# Expected: 145 tokens for an image of 145 rows. There are 257, and forward raises that tokens and features differ.
# Why it matters to a server of vision-language models: the option is how a caller asks for a cheaper image. The model
# was made for it: it has 144 learned queries for 768 pixels.
# The model below has few and narrow layers, random weights, and patches of 1 pixel instead of 16, so that all sizes are
# a sixteenth of the public ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 pillow==12.0.0 torch==2.13.0 numpy
cat > "$work/probe.py" <<'PY'
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil

print("transformers", transformers.__version__)
core = Tokenizer(models.WordLevel({"<image>": 0, "read": 1}, unk_token="read"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
images = DeepseekOcr2ImageProcessorPil(size={"height": 64, "width": 64}, tile_size=48)
processor = transformers.DeepseekOcr2Processor(images, tokenizer, patch_size=1)
model = transformers.DeepseekOcr2ForConditionalGeneration(
    transformers.DeepseekOcr2Config(
        vision_config={
            "sam_config": {"hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                           "image_size": 64, "patch_size": 1, "global_attn_indexes": [], "output_channels": 8,
                           "downsample_channels": [8, 8]},
            "encoder_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                               "num_attention_heads": 1, "num_key_value_heads": 1},
        },
        text_config={"vocab_size": 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 1, "mlp_layer_types": ["dense"], "num_experts_per_tok": 1,
                     "bos_token_id": None, "eos_token_id": None},
        image_token_id=0,
    )
).eval()
failed = {}
for crops in (True, False):
    made = processor(text="<image> read", images=Image.new("RGB", (40, 30)), crop_to_patches=crops, return_tensors="pt")
    with torch.inference_mode():
        rows = len(model.get_image_features(made["pixel_values"], None, made["num_local_patches"]).pooler_output[0])
        try:
            model(**made)
            failed[crops] = None
        except Exception as error:
            failed[crops] = f"{type(error).__name__}: {error}"
    tokens = int((made["input_ids"] == 0).sum())
    print(f"crop_to_patches={crops}: pixels {tuple(made['pixel_values'].shape)}, {tokens} tokens, {rows} rows;",
          failed[crops] or "runs")
assert failed[True] is None and failed[False] and "do not match" in failed[False]
PY
"$work/venv/bin/python" "$work/probe.py"
