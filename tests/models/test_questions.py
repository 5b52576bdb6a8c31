"""Answers about places, against the scenes they were made from."""

import random

from models.questions import ask_place, is_correct
from models.samples import make_scene
from models.scenes import HELD_OUT, random_size


def test_places_are_where_the_things_are():
    rng = random.Random(5)
    seen = set()
    for _ in range(200):
        scene, turn = make_scene(rng, "place", random_size(rng))
        width, height = scene.image.size
        (thing,) = [t for t in scene.things if f"The {t.name} " in turn.answer] or [
            t for t in scene.things if f"The {t.shape} " in turn.answer
        ]
        for word, right in {
            "top": thing.y < height / 3,
            "bottom": thing.y > 2 * height / 3,
            "left": thing.x < width / 3,
            "right": thing.x > 2 * width / 3,
        }.items():
            assert (word in turn.key.split()) == right
        assert is_correct(turn, turn.answer)
        seen.add(turn.key)
    assert len(seen) == 9


def test_things_on_a_border_between_thirds_are_not_asked_for():
    rng = random.Random(6)
    for _ in range(200):
        scene, _ = make_scene(rng, "place", random_size(rng))
        for thing in scene.things:
            part = thing.x / scene.image.width
            if len(scene.things) == 1 and abs(part - 1 / 3) < 0.04:
                assert ask_place(scene, rng) is None


def test_training_never_shows_the_pairs_kept_out_and_evaluation_does():
    rng = random.Random(7)
    for held_out, expected in ((False, False), (None, True), (True, True)):
        found = False
        for task in ("color", "count", "position", "place"):
            for _ in range(60):
                scene, _ = make_scene(rng, task, (160, 160), held_out=held_out)
                found |= any((t.color, t.shape) in HELD_OUT for t in scene.things)
        assert found == expected
