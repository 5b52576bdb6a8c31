"""Several prompts at once, each with its own image and its own question; one has no image at all.

python examples/offline_batch.py [--model FOLDER]
"""

import argparse
from pathlib import Path

from pictures import green_triangle, two_shapes, word

from engine import LLM, SamplingParams

POCKET = Path(__file__).parent.parent / "models" / "pocket"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def as_prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    llm = LLM(model=parser.parse_args().model)
    prompts = [
        {
            "prompt": as_prompt(PICTURE + "What is the content of this image?"),
            "multi_modal_data": {"image": two_shapes()},
        },
        {
            "prompt": as_prompt(PICTURE + "What color is the triangle?"),
            "multi_modal_data": {"image": green_triangle()},
        },
        {"prompt": as_prompt(PICTURE + "What does it say?"), "multi_modal_data": {"image": word()}},
        as_prompt("What can you do?"),
    ]
    for o in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
        print(o.outputs[0].text)


if __name__ == "__main__":
    main()
