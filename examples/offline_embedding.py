"""Vectors of texts and pictures, and how alike they are.

python examples/offline_embedding.py [--model FOLDER]
"""

import argparse
from pathlib import Path

from pictures import green_triangle, red_square, two_shapes

from engine import LLM

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def message(picture) -> list[dict]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe this image."}]
    return [{"role": "user", "content": content}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    llm = LLM(model=parser.parse_args().model, task="embed")
    outputs = llm.embed(messages=[message(p) for p in (red_square(), green_triangle(), two_shapes())])
    for o in outputs:
        print(len(o.embedding), "numbers, of which the first:", round(o.embedding[0], 4))
    print("scores:", [round(s, 4) for s in llm.score("a red square", ["a red square", "a green triangle"])])


if __name__ == "__main__":
    main()
