#!/usr/bin/env bash
# Transformers 5.23: Gemma3Processor switches off the pan-and-scan that its image processor is set to.
#
# A checkpoint's preprocessor_config.json states do_pan_and_scan, with which wide and tall images are shown in several views.
# Expected: the processor does what its image processor's configuration says.
# The processor has a default of its own, false, which it passes with every call: the image processor alone gives five
# views of a wide image, the processor around it one. Only an argument of the call turns it on.
# Why it matters to a server of vision-language models: a checkpoint that is published with pan-and-scan is answered
# without it, and the number of image tokens differs from what its files say.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy pillow
cat > "$work/probe.py" <<'PY'
import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

print("transformers", transformers.__version__)
words = ["<pad>", "<unk>", "<start_of_image>", "<image_soft_token>", "<end_of_image>", "what", "is", "this"]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
core.add_special_tokens(words[:5])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core,
    pad_token="<pad>",
    extra_special_tokens={"boi_token": words[2], "image_token": words[3], "eoi_token": words[4]},
)
images = Gemma3ImageProcessorPil(
    do_pan_and_scan=True,
    pan_and_scan_min_crop_size=256,
    pan_and_scan_max_num_crops=4,
    pan_and_scan_min_ratio_to_activate=1.2,
)
wide = Image.fromarray(np.zeros((512, 2048, 3), np.uint8))
processor = Gemma3Processor(images, tokenizer, image_seq_length=4)


def views(**options):
    made = processor(text=["<start_of_image> what"], images=[wide], return_tensors="pt", **options)
    return made["pixel_values"].shape[0]


alone = images(wide, return_tensors="pt")["pixel_values"].shape[0]
print("do_pan_and_scan of the processor's image processor:", processor.image_processor.do_pan_and_scan)
print(f"views: image processor {alone}, processor {views()}, asked by argument {views(do_pan_and_scan=True)}")
assert (alone, views(), views(do_pan_and_scan=True)) == (5, 1, 5), "the processor does as its files say now"
PY
"$work/venv/bin/python" "$work/probe.py"
