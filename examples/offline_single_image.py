"""One image and one prompt in the model's own prompt format.

python examples/offline_single_image.py [--model FOLDER]
"""

import argparse
from pathlib import Path

from pictures import two_shapes

from engine import LLM, SamplingParams

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    llm = LLM(model=parser.parse_args().model)

    # Every model has its own placeholder for an image; llm.chat() knows how.
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "What is the content of this image?<|im_end|>\n<|im_start|>assistant\n"
    )
    outputs = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": two_shapes()}}, SamplingParams(max_tokens=64)
    )
    for o in outputs:
        print(o.outputs[0].text)


if __name__ == "__main__":
    main()
