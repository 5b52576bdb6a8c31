"""Give an image's embeddings in place of the image.

    python examples/offline_image_embeddings.py [--model FOLDER] [--embeddings FILE]

FILE is what torch.save() wrote: {"image_embeds": (images, rows, hidden), "image_grid_thw": (images, 3)}.
Without one, random rows stand in, in which the model sees nothing.
"""

import argparse
from pathlib import Path

import torch

from engine import LLM, SamplingParams

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--hidden-size", type=int, default=256, help="of the language model")
    options = parser.parse_args()

    llm = LLM(model=options.model)
    if options.embeddings:
        data = torch.load(options.embeddings, weights_only=True)
    else:
        # Qwen2-VL merges patches two by two: a grid of 8 x 6 patches is 12 rows.
        generator = torch.Generator().manual_seed(0)
        data = {
            "image_embeds": torch.randn(1, 12, options.hidden_size, generator=generator),
            "image_grid_thw": torch.tensor([[1, 8, 6]]),
        }
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "What is the content of this image?<|im_end|>\n<|im_start|>assistant\n"
    )
    outputs = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": data}}, SamplingParams(max_tokens=64)
    )
    for o in outputs:
        print(o.outputs[0].text)


if __name__ == "__main__":
    main()
