import random

import numpy as np
import pytest

from models import questions, samples, scenes


def same(a: samples.Sample, b: samples.Sample) -> bool:
    pictures = zip(a.images, b.images, strict=True)
    return a.turns == b.turns and all(x.tobytes() == y.tobytes() for x, y in pictures)


def test_everything_follows_from_the_seed() -> None:
    for task in samples.EVALUATION_TASKS:
        assert all(map(same, samples.evaluation_set(task, 4), samples.evaluation_set(task, 4)))
    one, other = (samples.picture_sample(random.Random(seed), (120, 90)) for seed in (1, 2))
    assert not same(one, other)


@pytest.mark.parametrize("task", samples.EVALUATION_TASKS)
def test_an_answer_counts_as_right_for_its_own_question_alone(task: str) -> None:
    turns = [sample.turns[0] for sample in samples.evaluation_set(task, 30)]
    assert all(questions.is_correct(turn, turn.answer) for turn in turns)
    assert not any(questions.is_correct(turn, "") for turn in turns)
    keys = {turn.key for turn in turns}
    assert len(keys) > 1
    for turn in turns:
        others = [other for other in turns if other.question == turn.question and other.key != turn.key]
        if task not in ("word", "number"):
            assert not any(questions.is_correct(turn, other.answer) for other in others)


def test_words_are_compared_as_wholes() -> None:
    turn = questions.Turn("word", "Read the text.", 'It says "CAT".', "CAT")
    assert questions.is_correct(turn, "CAT")
    for wrong in ('It says "CATS".', 'It says "cat".', 'It says "C AT".'):
        assert not questions.is_correct(turn, wrong)


def test_some_pairs_are_never_drawn_for_training() -> None:
    rng = random.Random(0)
    drawn = set()
    for _ in range(600):
        scene, _ = samples.make_scene(rng, rng.choice(list(samples.TRAINING_TASKS)), (100, 100))
        drawn |= {(thing.color, thing.shape) for thing in scene.things}
    assert not drawn & scenes.HELD_OUT
    assert len(drawn) == len(scenes.COLORS) * len(scenes.SHAPES) - len(scenes.HELD_OUT)
    for sample in samples.evaluation_set("new pairs", 20):
        assert any(shape in str(sample.turns[0]) for _, shape in scenes.HELD_OUT)


def test_things_are_painted_where_and_as_they_are_said_to_be() -> None:
    rng = random.Random(3)
    for _ in range(60):
        scene, _ = samples.make_scene(rng, "count", (200, 140))
        pixels = np.asarray(scene.image).astype(int)
        for thing in scene.things:
            seen = pixels[round(thing.y), round(thing.x)]
            distances = {
                name: min(np.abs(seen - np.array(base)).max() for base in bases)
                for name, bases in scenes.COLORS.items()
            }
            # Neighbouring shades and JPEG may blur a little.
            assert distances[thing.color] <= 24, (thing, seen)


def test_positions_and_counts_are_true() -> None:
    rng = random.Random(4)
    for _ in range(80):
        scene, turn = samples.make_scene(rng, "count", (160, 160))
        nouns = [thing.shape for thing in scene.things]
        wanted = {str(len(nouns))} | {str(nouns.count(noun)) for noun in nouns}
        assert turn.key in wanted
        if "shapes" in turn.question or "objects" in turn.question:
            assert turn.key == str(len(nouns))
        scene, turn = samples.make_scene(rng, "position", (160, 160))
        if turn.key in ("left of", "right of", "above", "below"):
            first, second = sorted(scene.things, key=lambda t: turn.answer.find(t.shape))[:2]
            if len({thing.shape for thing in scene.things}) == len(scene.things) == 2:
                axis = "x" if "of" in turn.key else "y"
                before = getattr(first, axis) < getattr(second, axis)
                assert before == (turn.key in ("left of", "above"))


def test_text_stays_inside_of_its_picture() -> None:
    rng = random.Random(5)
    for _ in range(60):
        size = scenes.random_size(rng)
        text = samples.random_text(rng, "word")
        scene = scenes.text_scene(rng, size, text)
        pixels = np.asarray(scene.image).astype(int)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.abs(border - np.median(border, axis=0)).max() < 60, text
