"""Ask a model about images, without a server.

    python examples/offline.py [--model models/pocket] [IMAGE ...]

Without an image, one is drawn.
"""

import argparse
from pathlib import Path

from pictures import two_shapes
from PIL import Image

from engine import LLM, SamplingParams

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "pocket"))
    parser.add_argument("images", nargs="*", type=Path)
    options = parser.parse_args()

    pictures = [Image.open(path) for path in options.images] or [two_shapes()]
    questions = ["Describe this image.", "How many shapes are there?"]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for picture in pictures
        for question in questions
    ]
    llm = LLM(model=options.model)
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=64))
    for conversation, output in zip(conversations, outputs, strict=True):
        print(conversation[0]["content"][1]["text"], "->", output.outputs[0].text)


if __name__ == "__main__":
    main()
