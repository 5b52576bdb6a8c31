"""Compiles the kernels of models into Triton's cache, with weights of noise: ``python warm.py MODEL ...``.

A model is a folder or a hub name. Without a GPU nothing happens: pods then compile kernels when they start.
"""

import sys

import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.errors import SightlineError


def main(models: list[str]) -> None:
    """Run a short answer of each model, about a picture if the model takes pictures."""
    if models and not torch.cuda.is_available():
        print("There is no GPU here: pods will compile their kernels when they start.")
        return
    for model in models:
        answer(model)
        print(f"The kernels of {model} are compiled.")


def answer(model: str) -> None:
    """Generate a few tokens; what they say doesn't matter."""
    llm = LLM(model=model, load_format="dummy", max_model_len=1024)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    picture = {"type": "image", "image": Image.new("RGB", (224, 224))}
    words = {"type": "text", "text": "What is in this picture?"}
    try:
        llm.chat([{"role": "user", "content": [picture, words]}], params)
    except SightlineError:
        # It takes no pictures, or has no chat template.
        llm.generate("What is in this picture?", params)


if __name__ == "__main__":
    main(sys.argv[1:])
