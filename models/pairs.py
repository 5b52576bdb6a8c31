"""Scenes and their captions, for training and held-out evaluation of embeddings."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from models.questions import caption
from models.samples import make_scene
from models.scenes import random_size

_HELD_OUT_SEED = 1 << 41


def reworded(plain: str, rng: random.Random) -> str:
    """A :func:`caption` in one of several wordings, with all that it says."""
    body = plain.removesuffix(".")
    lower = body[0].lower() + body[1:]
    return rng.choice(
        [
            plain,
            body,
            lower,
            f"A picture of {lower}.",
            f"An image of {lower}.",
            f"The picture shows {lower}.",
            f"The image shows {lower}.",
            f"I see {lower}.",
            f"{body} in a picture.",
        ]
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """An image, its caption in the one wording that tells scenes apart, and in any wording."""

    image: Image.Image
    caption: str
    text: str


def captioned_pairs(
    rng: random.Random, count: int, size: tuple[int, int] | None, *, held_out: bool | None = False
) -> list[Pair]:
    """Scenes of which no two have equal captions; of one size, or with None of any."""
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        task = rng.choices(("caption", "word", "number"), (70, 22, 8))[0]
        scene, _ = make_scene(rng, task, size or random_size(rng), held_out=held_out)
        plain = caption(scene)
        if plain not in pairs:
            pairs[plain] = Pair(scene.image, plain, reworded(plain, rng))
    return list(pairs.values())


def retrieval_set(count: int, seed: int = 0) -> list[Pair]:
    """``count`` pairs of distinct captions; the same for every call, and images never drawn in training."""
    # Any colour and shape: one pair in twelve was never seen in training.
    return captioned_pairs(random.Random(_HELD_OUT_SEED + seed), count, None, held_out=None)
