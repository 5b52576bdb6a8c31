#!/usr/bin/env bash
# mistral-common 1.13: a text and an image change places in the prompt, if a turn has just these two.
#
# A turn of a user is a list of texts and images, whose order says what belongs to what.
#
# Expected: the prompt has them in the order of the list, as it has with two images.
# What happens: of a turn with one text and one image the image comes first, however it is written: "text, image" and
# "image, text" give the same tokens. Texts side by side are joined before, so "text, text, image" is turned round as
# well, and so are two messages one after the other, one with the text and one with the image. With a text on both
# sides, or a second image, the order stays.
# Why it matters to a server of vision-language models: it is the publisher's library for Pixtral, Mistral Small 3 and
# Ministral 3, and the models have seen its prompts. A chat template that writes parts where they stand gives other
# tokens for the most common kind of prompt, and other answers. A server has to turn the pair round as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mistral-common==1.13.1 opencv-python-headless==4.12.0.88
cat > "$work/first.py" <<'PY'
from importlib.metadata import version

from mistral_common.protocol.instruct.messages import ImageChunk, TextChunk, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

tokenizer = MistralTokenizer.v3(is_tekken=True, is_mm=True)
image, see, what = ImageChunk(image=Image.new("RGB", (16, 16))), TextChunk(text="See:"), TextChunk(text="What?")


def prompt(*turns):
    """The tokens of messages of a user, each a list of parts, as text."""
    messages = [UserMessage(content=list(parts)) for parts in turns]
    text = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).text
    return text.replace("[IMG][IMG_END]", "(image)").removeprefix("<s>[INST]").removesuffix("[/INST]")


print("mistral-common", version("mistral-common"))
for turns, written in (
    ([[image, see]], "(image)See:"),
    ([[see, image]], "(image)See:"),
    ([[see, what, image]], "(image)See:\n\nWhat?"),
    ([[see], [image]], "(image)See:"),
    ([[see, image, what]], "See:(image)What?"),
    ([[see, image, image]], "See:(image)(image)"),
):
    parts = [["image" if part is image else part.text for part in turn] for turn in turns]
    found = prompt(*turns)
    print(parts, "becomes", repr(found))
    assert found == written
PY
"$work/venv/bin/python" "$work/first.py"
