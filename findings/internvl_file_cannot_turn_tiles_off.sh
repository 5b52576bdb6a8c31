#!/usr/bin/env bash
# Transformers: an InternVL checkpoint's own "crop_to_patches": false has no effect.
#
# preprocessor_config.json is where a checkpoint says how its images are prepared, and its image processor follows
# the field. InternVLProcessor, which AutoProcessor returns, has defaults of its own for the image processor and
# passes crop_to_patches true with each call, so the file's value never counts. Only an argument of the call does.
#
# Expected: a checkpoint saved with crop_to_patches false shows an image in one crop.
# What happens: the image processor alone gives 1 crop, the whole processor of the same files up to 13.
# Why it matters to a server of vision-language models: whoever tunes a model without tiles and saves that gets 13
# times the tokens per image. A server that reads the file as it stands gets other prompts than Transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy pillow==12.3.0
cat > "$work/tiles.py" <<'PY'
import json
import sys
from importlib import import_module
from pathlib import Path

import tokenizers
import transformers
from PIL import Image

folder = Path(sys.argv[1])
models = "transformers.models."
images_class = import_module(models + "got_ocr2.image_processing_pil_got_ocr2").GotOcr2ImageProcessorPil
whole_class = import_module(models + "internvl.processing_internvl").InternVLProcessor
# The video half needs torchvision and isn't used here.
image_only = type(
    whole_class.__name__,
    (whole_class,),
    {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])},
)
names = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<unk>"]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
words.add_special_tokens(names)
fields = ("context_image_token", "start_image_token", "end_image_token", "video_token")
special = dict(zip(fields, names, strict=False))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=special)

images_class(size={"height": 448, "width": 448}, crop_to_patches=False).save_pretrained(folder)
stated = json.loads((folder / "preprocessor_config.json").read_text())["crop_to_patches"]
images = images_class.from_pretrained(folder)
picture = Image.new("RGB", (1800, 1350))
alone = len(images([picture])["pixel_values"])
whole = len(image_only(images, tokenizer, image_seq_length=256)(text="<IMG_CONTEXT>", images=[picture])["pixel_values"])
print("transformers", transformers.__version__)
print(f"the file says crop_to_patches {stated}; crops of the image processor: {alone}, of InternVLProcessor: {whole}")
assert stated is False and alone == 1 and whole == 13
PY
"$work/venv/bin/python" "$work/tiles.py" "$work"
