#!/usr/bin/env bash
# Transformers: LightOnOCR drops the last line of patches of half of all page sizes, and small images entirely.
#
# Its image processor resizes a page to whole patches of 14 pixels, as the public checkpoint's file says
# (patch_size 14). A row of the language model stands for a square of 2 x 2 patches. PixtralProcessor, which
# Mistral Small 3.1 uses with the same tower, asks its image processor for whole squares instead, 28 pixels.
#
# Expected: every part of a page has a row, as with Mistral Small 3.1.
# What happens: with an odd number of lines of patches the last line is encoded, but no square has it: up to 14
# pixels at the lower edge and at the right edge give no row. An image of up to 14 pixels a side gives no row at
# all: the prompt then holds no image, and nothing says so.
# Why it matters to a server of vision-language models: a line of text at the edge of a cropped page is never read,
# depending on the page's size alone. A server must refuse images that give no rows, and count rows as this
# processor does, or its answers differ.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy pillow==12.3.0
cat > "$work/edge.py" <<'PY'
import sys
from importlib import import_module

import tokenizers
import transformers
from PIL import Image

models = "transformers.models."
pixtral = import_module(models + "pixtral.image_processing_pil_pixtral")
# Only a function of this module is used; the module itself imports torchvision.
sys.modules[models + "pixtral.image_processing_pixtral"] = pixtral
square_processor = import_module(models + "pixtral.processing_pixtral").PixtralProcessor
lighton_processor = import_module(models + "lighton_ocr.processing_lighton_ocr").LightOnOcrProcessor

names = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<unk>"]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
words.add_special_tokens(names)
special = dict(zip(("image_token", "image_break_token", "image_end_token"), names, strict=False))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=special)


def rows(processor, size):
    images = pixtral.PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14})
    made = processor(images, tokenizer, patch_size=14, spatial_merge_size=2)(
        text="[IMG]", images=[Image.new("RGB", size)], return_tensors="pt"
    )
    (shown,) = [tuple(int(side) for side in entry) for entry in made["image_sizes"]]
    return int((made["input_ids"] == 0).sum()), shown


print("transformers", transformers.__version__)
found = {}
for size in ((700, 994), (700, 980), (14, 14)):
    for name, processor in (("LightOnOCR", lighton_processor), ("Mistral Small 3.1", square_processor)):
        count, (height, width) = rows(processor, size)
        found[name, size] = count
        seen = (height // 28 * 28) * (width // 28 * 28) / (height * width)
        print(f"{size[0]}x{size[1]} pixels, {name}: resized to {width}x{height}, {count} rows, {seen:.1%} of it")
assert found["LightOnOCR", (700, 994)] == found["LightOnOCR", (700, 980)], "the last line has rows now"
assert found["LightOnOCR", (14, 14)] == 0 and found["Mistral Small 3.1", (14, 14)] == 1
assert found["Mistral Small 3.1", (700, 994)] > found["LightOnOCR", (700, 994)]
PY
"$work/venv/bin/python" "$work/edge.py"
