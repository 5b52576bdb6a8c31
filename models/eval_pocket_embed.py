"""Measures how often a served model finds a held-out scene's caption among a hundred, and the reverse.

python -m models.eval_pocket_embed --base-url http://127.0.0.1:8000/v1 --model pocket-embed
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from models.eval_pocket import data_url
from models.pairs import retrieval_set

Item = Image.Image | str
#: Images or texts to float vectors ``(N, D)`` of length 1.
Embed = Callable[[Sequence[Item]], np.ndarray]
RANKS = (1, 5, 10)


def evaluate(embed: Embed, count: int, seed: int = 0) -> dict[str, float]:
    """Recall by direction and rank, such as ``"text->picture @1"``; prints a table.

    Args:
        count: pairs, among which each query has one right answer.
        seed: of the held-out pairs.
    """
    pairs = retrieval_set(count, seed)
    texts, pictures = embed([pair.text for pair in pairs]), embed([pair.image for pair in pairs])
    scores = {}
    print(f"{'recall among ' + str(count):22}" + "".join(f"{'@' + str(rank):>8}" for rank in RANKS))
    for name, similarity in (("text->picture", texts @ pictures.T), ("picture->text", pictures @ texts.T)):
        found = [recall(similarity, rank) for rank in RANKS]
        scores |= {f"{name} @{rank}": value for rank, value in zip(RANKS, found, strict=True)}
        print(f"{name:22}" + "".join(f"{value:8.1%}" for value in found), flush=True)
    return scores


def recall(similarity: np.ndarray, rank: int) -> float:
    """Share of rows ``i`` of ``(N, N)`` in which fewer than ``rank`` others reach the entry at ``(i, i)``."""
    right = np.diagonal(similarity)[:, None]
    # A tie counts as lost: vectors that are all the same must not look perfect.
    better = (similarity >= right).sum(axis=1) - 1
    return float((better < rank).mean())


def messages(item: Item) -> list[dict[str, Any]]:
    """One user message: a text, or an image alone as a PNG data URL."""
    if isinstance(item, str):
        part: dict[str, Any] = {"type": "text", "text": item}
    else:
        part = {"type": "image_url", "image_url": {"url": data_url(item)}}
    return [{"role": "user", "content": [part]}]


class ServedEmbed:
    """Asks a server's ``/v1/embeddings``, ``concurrency`` requests at a time."""

    def __init__(self, base_url: str, model: str, concurrency: int) -> None:
        self.client = httpx.Client(base_url=base_url, timeout=120)
        self.model, self.concurrency = model, concurrency

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return np.array(list(pool.map(self._one, items)))

    def _one(self, item: Item) -> list[float]:
        response = self.client.post("embeddings", json={"model": self.model, "messages": messages(item)})
        response.raise_for_status()
        return response.json()["data"][0]["embedding"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket-embed")
    parser.add_argument("--count", type=int, default=100, help="pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    embed = ServedEmbed(options.base_url, options.model, options.concurrency)
    evaluate(embed, options.count, options.seed)


if __name__ == "__main__":
    main()
