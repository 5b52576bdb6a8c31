"""Several images in one prompt.

python examples/offline_multi_image.py [--model FOLDER]
"""

import argparse
from pathlib import Path

from pictures import green_triangle, red_square

from engine import LLM, SamplingParams

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    llm = LLM(
        model=parser.parse_args().model,
        max_model_len=1024,  # less memory for the KV cache than the model's own limit
        limit_mm_per_prompt={"image": 2},  # a prompt with more is refused
    )
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = (
        f"<|im_start|>user\n{picture}{picture}Do both pictures show the same color?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    outputs = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": [red_square(), green_triangle()]}},
        SamplingParams(temperature=0, max_tokens=64),
    )
    for o in outputs:
        print(o.outputs[0].text)


if __name__ == "__main__":
    main()
