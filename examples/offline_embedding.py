"""Embed texts and images into one space and print their similarity.

python examples/offline_embedding.py [--model FOLDER]
"""

import argparse
from pathlib import Path

from pictures import green_triangle, red_square

from engine import LLM

POCKET_EMBED = Path(__file__).parent.parent / "models" / "pocket-embed"


def message(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET_EMBED))
    llm = LLM(model=parser.parse_args().model, task="embed")
    pictures = [red_square(), green_triangle()]
    texts = ["A red square.", "A green triangle."]
    parts = [
        *({"type": "image", "image": p} for p in pictures),
        *({"type": "text", "text": t} for t in texts),
    ]
    vectors = [o.embedding for o in llm.embed(messages=[message(part) for part in parts])]
    print(len(vectors[0]), "numbers, of which the first:", round(vectors[0][0], 4))
    for text, vector in zip(texts, vectors[2:], strict=True):
        alike = [sum(a * b for a, b in zip(vector, other, strict=True)) for other in vectors[:2]]
        print(f"{text} is picture {alike.index(max(alike)) + 1}:", [round(x, 3) for x in alike])
    print("score:", [round(s, 3) for s in llm.score("a red square", ["a red square", "a green triangle"])])


if __name__ == "__main__":
    main()
