"""Answers that repeat themselves are found, and nothing else is."""

import random

import pytest

from benchmarks.host import MODEL
from engine.errors import InvalidRequest
from engine.progress import ChoiceProgress
from engine.repetition import RepetitionDetection, RepetitionWatch
from engine.request import Request
from engine.request_group import ChoiceText
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer


def repeats(tokens: list[int], longest: int, shortest: int, count: int) -> bool:
    """Whether ``tokens`` end with one pattern ``count`` times."""
    for size in range(max(shortest, 1), longest + 1):
        if len(tokens) >= size * count and tokens[-size * count :] == tokens[-size:] * count:
            return True
    return False


@pytest.mark.parametrize(
    ("longest", "shortest", "count"), [(1, 0, 2), (1, 1, 5), (4, 2, 3), (7, 7, 2), (9, 0, 4)]
)
def test_a_pattern_is_found_with_its_last_token(longest, shortest, count):
    rng, found = random.Random(longest), 0
    for _ in range(60):
        watch, tokens = RepetitionWatch(RepetitionDetection(longest, shortest, count)), []
        pattern = [rng.randrange(2) for _ in range(rng.randint(1, 10))]
        # Noise, a pattern with now and then another token, noise.
        noisy = [token if rng.random() < 0.98 else 2 for token in pattern * 5]
        for token in [rng.randrange(3) for _ in range(15)] + noisy + [0, 1, 2]:
            tokens.append(token)
            wanted = repeats(tokens, longest, shortest, count)
            assert watch.add(token) == wanted
            found += wanted
    assert found


def test_another_engine_knows_what_came_before():
    wanted = {"max_pattern_size": 2, "min_count": 3}
    params = SamplingParams(repetition_detection=wanted)
    request = Request("a", [5], 1, params, 64, frozenset())
    text = ChoiceText.of(request, Tokenizer.load(MODEL), ChoiceProgress([70, 71, 70, 71, 70], 0))
    assert not text.plain and text.watch.add(71)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"max_pattern_size": 4}, ".min_count"),
        ({"max_pattern_size": 4, "min_count": 1}, ".min_count"),
        ({"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, ".min_pattern_size"),
        ({"max_pattern_size": 4096, "min_count": 2}, ".max_pattern_size"),
        ({"min_count": -1}, ".min_count"),
        ({"most": 1}, ""),
        (3, ""),
    ],
)
def test_what_can_not_be_looked_for_is_refused_by_name(given, field):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(repetition_detection=given)
    assert caught.value.param == f"repetition_detection{field}"


def test_nothing_may_be_looked_for():
    assert SamplingParams(repetition_detection={"max_pattern_size": 0}).repetition_detection is None
