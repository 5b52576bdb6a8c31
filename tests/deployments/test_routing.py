"""Policies that choose replicas by content and load."""

import numpy as np
import pytest

from deployments.routing import KEY_TOKENS, MOST_KEYS, ItemPlaces, Load, PromptPlaces, prompt_keys, ranked
from engine.prompt import EngineInput, MediaItem, MediaSpan, PlaceholderRun

THREE = ("a", "b", "c")
IDLE = dict.fromkeys(THREE, 0)


def keys(count: int) -> list[bytes]:
    return [f"item {number}".encode() for number in range(count)]


def test_a_name_that_goes_moves_only_its_own_keys_and_all_get_a_share():
    before = {key: ranked(key, THREE) for key in keys(300)}
    for key, order in before.items():
        assert ranked(key, ("c", "a")) == [name for name in order if name != "b"]
    shares = [sum(order[0] == name for order in before.values()) for name in THREE]
    assert min(shares) > 70


def test_equal_items_go_to_one_replica_and_two_ingresses_agree():
    one, other = ItemPlaces(), ItemPlaces()
    for key in keys(50):
        first = one.choose(key, IDLE)[0]
        one.sent(key, first)
        one.ended(key, first)
        assert one.choose(key, IDLE)[0] == other.choose(key, dict(reversed(IDLE.items())))[0] == first


def test_equal_items_in_flight_stay_together_whatever_the_load():
    places, key = ItemPlaces(), b"hot"
    first = places.choose(key, IDLE)[0]
    # Before and after the first is sent, and until the last has ended.
    assert places.choose(key, IDLE | {first: 99})[0] == first
    for _ in range(3):
        places.sent(key, first)
    for _ in range(2):
        places.ended(key, first)
        assert places.choose(key, IDLE | {first: 99})[0] == first
    places.ended(key, first)
    assert places.choose(key, IDLE | {first: 99})[0] != first
    assert places.choose(key, {name: 0 for name in THREE if name != first})[0] != first


def test_an_overloaded_replica_passes_its_items_to_their_next():
    key = b"item"
    order = ranked(key, THREE)
    # A few requests are no overload, and an overload of all is none of one.
    assert ItemPlaces().choose(key, IDLE | {order[0]: 3}) == order
    # Four requests are as many as a replica may have whatever the others have.
    assert ItemPlaces().choose(key, IDLE | {order[0]: 4}) == [*order[1:], order[0]]
    assert ItemPlaces().choose(key, dict.fromkeys(THREE, 50)) == order
    assert ItemPlaces().choose(key, {**dict.fromkeys(THREE, 2), order[0]: 20}) == [*order[1:], order[0]]


def prompt(tokens: list[int], salt: str = "", image: str = "", at: int = 0) -> EngineInput:
    spans = []
    if image:
        item = MediaItem("image", image, 4, (1, 2, 2), (28, 28), (PlaceholderRun(1, 4, True),))
        spans = [MediaSpan(item, at, 4)]
    return EngineInput(tokens, spans, None, salt)


def shared(one: EngineInput, other: EngineInput) -> int:
    """Keys that two prompts share, all at their beginning."""
    first, second = prompt_keys(one), prompt_keys(other)
    count = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    assert not set(first[count:]) & set(second[count:])
    return count


def test_prompts_share_the_keys_of_what_is_equal():
    tokens = np.arange(10 * KEY_TOKENS).tolist()
    base = prompt(tokens)
    assert len(prompt_keys(base)) == 10 and shared(base, prompt([*tokens, 5])) == 10
    changed = list(tokens)
    changed[3 * KEY_TOKENS + 5] += 1
    assert shared(base, prompt(changed)) == 3
    assert shared(base, prompt(tokens, salt="tenant")) == 0
    place = 6 * KEY_TOKENS
    assert shared(prompt(tokens, image="x", at=place), prompt(tokens, image="x", at=place)) == 10
    assert shared(prompt(tokens, image="x", at=place), prompt(tokens, image="y", at=place)) == 6
    assert len(prompt_keys(prompt([1] * (KEY_TOKENS * MOST_KEYS * 2)))) == MOST_KEYS
    assert prompt_keys(prompt([1] * (KEY_TOKENS - 1))) == []


class TestPromptPlaces:
    loads: dict[str, Load] = dict.fromkeys(THREE, Load())
    chain = keys(8)
    tokens = 8 * KEY_TOKENS + 10

    def test_a_prompt_follows_its_beginning(self):
        places = PromptPlaces()
        home = places.choose(self.chain, self.tokens, self.loads)[0]
        other = next(name for name in THREE if name != home)
        places.sent(self.chain[:5], other)
        assert places.choose(self.chain, self.tokens, self.loads)[0] == other
        assert places.known_tokens(self.chain, other) == 5 * KEY_TOKENS
        # Keys in the middle are of no use without those before.
        places.sent(self.chain[6:], home)
        assert places.known_tokens(self.chain, home) == 0

    @pytest.mark.parametrize(
        "load",
        [Load(requests=20), Load(waiting_tokens=600), Load(kv_usage=1.0)],
        ids=["requests", "waiting tokens", "KV blocks"],
    )
    def test_load_has_the_last_word(self, load):
        places = PromptPlaces()
        places.sent(self.chain, "b")
        assert places.choose(self.chain, self.tokens, self.loads)[0] == "b"
        light = Load(load.requests // 10, load.waiting_tokens // 10, load.kv_usage * 0.9)
        assert places.choose(self.chain, self.tokens, self.loads | {"b": light})[0] == "b"
        assert places.choose(self.chain, self.tokens, self.loads | {"b": load})[-1] == "b"

    def test_prompts_without_keys_go_where_there_is_least_to_do(self):
        loads = {"a": Load(3), "b": Load(1), "c": Load(2)}
        assert PromptPlaces().choose([], 5, loads) == ["b", "c", "a"]

    def test_turns_of_a_conversation_agree_without_memory(self):
        turns = [keys(count) for count in range(4, 9)]
        assert len({PromptPlaces().choose(turn, 900, self.loads)[0] for turn in turns}) == 1

    def test_memory_is_bounded_and_gone_replicas_are_forgotten(self):
        places = PromptPlaces(remembered=10)
        places.sent(self.chain, "a")
        assert places.known_tokens(self.chain, "a") == 8 * KEY_TOKENS
        places.sent([b"other", b"others"], "a")
        assert places.known_tokens(self.chain, "a") == 8 * KEY_TOKENS
        places.sent([b"one more"], "a")
        # The end of the oldest prompt goes first.
        assert places.known_tokens(self.chain, "a") == 7 * KEY_TOKENS
        places.keep(["b"])
        assert places.known_tokens(self.chain, "a") == 0
