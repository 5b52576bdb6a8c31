"""Chooses replicas by what they have seen before, with load having the last word. Knows nothing of Ray.

Both policies return all replicas, best first: where the first has no room, the next is asked.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from engine.prompt import EngineInput
from engine.scheduling.prefix_cache import BlockHasher

#: Tokens per key of a prompt, and the most keys. Prompts that share more than that many tokens are alike.
KEY_TOKENS, MOST_KEYS = 64, 128

#: The key that decides where a new prompt goes among replicas of equal cost. All ingress replicas agree on it
#: for the turns of a conversation, and prompts that share only a short system prompt spread out.
_AGREED_KEY = 3

_HASHER = BlockHasher(KEY_TOKENS, "routing")


def ranked(key: bytes, names: Sequence[str]) -> list[str]:
    """``names`` in this key's own order (rendezvous hashing): without a name, the others keep their order."""
    return sorted(names, key=lambda name: blake2b(name.encode(), key=key[:64], digest_size=8).digest())


def prompt_keys(inputs: EngineInput) -> list[bytes]:
    """Hashes of the prompt's first tokens, each of :data:`KEY_TOKENS` more than the one before. Equal only if
    tokens, images and salt up to there are equal."""
    keys: list[bytes] = []
    end = min(len(inputs.token_ids), KEY_TOKENS * MOST_KEYS)
    _HASHER.extend(keys, inputs.token_ids, end, inputs.spans, inputs.cache_salt)
    return keys


class ItemPlaces:
    """The encoder replica for an item: by its content, so that each replica's cache holds other items.

    Args:
        slack: how much above the mean a replica's load may be before its items go elsewhere.
        least: requests that a replica may always have.
    """

    def __init__(self, slack: float = 1.25, least: int = 4) -> None:
        self._slack, self._least = slack, least
        self._in_flight: OrderedDict[bytes, tuple[str, int]] = OrderedDict()

    def choose(self, key: bytes, loads: Mapping[str, int]) -> list[str]:
        """All replicas, best first.

        Args:
            key: of the item's content and salt.
            loads: requests at each replica.
        """
        order = ranked(key, list(loads))
        # Another equal item costs the replica nothing while it encodes the first.
        busy = self._in_flight.get(key, ("", 0))[0]
        if busy in loads:
            return [busy, *(name for name in order if name != busy)]
        most = max(self._least, self._slack * (sum(loads.values()) + 1) / len(loads))
        order.sort(key=lambda name: loads[name] + 1 > most)
        # Equal items that arrive before this one is sent follow it.
        self._note(key, order[0], 0)
        return order

    def sent(self, key: bytes, name: str) -> None:
        """The item went to the replica ``name``."""
        place, count = self._in_flight.get(key, (name, 0))
        self._note(key, name, count + 1 if place == name else 1)

    def ended(self, key: bytes, name: str) -> None:
        """The replica has answered."""
        place, count = self._in_flight.get(key, ("", 0))
        if place == name:
            self._note(key, name, count - 1)
            if count <= 1:
                del self._in_flight[key]

    def _note(self, key: bytes, name: str, count: int) -> None:
        self._in_flight[key] = name, count
        self._in_flight.move_to_end(key)
        # Requests that were cancelled before they were sent leave their keys here.
        while len(self._in_flight) > _MOST_ITEMS:
            self._in_flight.popitem(last=False)


_MOST_ITEMS = 1 << 16


@dataclass(frozen=True, slots=True)
class Load:
    """The work of a language model replica.

    Attributes:
        requests: at the replica.
        waiting_tokens: known tokens of requests that wait for a slot.
        kv_usage: share of the KV blocks that running requests have.
    """

    requests: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0


class PromptPlaces:
    """The language model replica for a prompt: the one that has least to compute before the first token.

    The cost of a replica, in tokens: those of the prompt that it has not seen, those that wait there, and
    ``request_tokens`` for each request there, which makes every step longer. Above ``full`` KV blocks are so
    scarce that cached ones go and running requests are preempted: a prompt costs up to twice its tokens more.

    Args:
        request_tokens: tokens of a prompt that take as long as one running request delays it.
        remembered: keys that are remembered for each replica, least recently used go first.
        full: share of the KV blocks.
    """

    def __init__(self, request_tokens: float = 32.0, remembered: int = 1 << 14, full: float = 0.9) -> None:
        self._request_tokens = request_tokens
        self._remembered = remembered
        self._full = full
        self._seen: dict[str, OrderedDict[bytes, None]] = {}

    def choose(self, keys: Sequence[bytes], tokens: int, loads: Mapping[str, Load]) -> list[str]:
        """All replicas, best first.

        Args:
            keys: of the prompt, see :func:`prompt_keys`.
            tokens: of the prompt.
        """
        order = ranked(keys[min(_AGREED_KEY, len(keys) - 1)], list(loads)) if keys else list(loads)
        costs = {name: self._cost(keys, tokens, name, load) for name, load in loads.items()}
        return sorted(order, key=lambda name: costs[name])

    def _cost(self, keys: Sequence[bytes], tokens: int, name: str, load: Load) -> float:
        cost: float = tokens - self.known_tokens(keys, name) + load.waiting_tokens
        cost += self._request_tokens * load.requests
        pressure = max(0.0, load.kv_usage - self._full) / (1 - self._full)
        return cost + 2 * tokens * pressure

    def known_tokens(self, keys: Sequence[bytes], name: str) -> int:
        """Tokens of the prompt that the replica has probably cached."""
        seen = self._seen.get(name, OrderedDict())
        # The longest known beginning; keys are chained.
        count = next((index for index, key in enumerate(keys) if key not in seen), len(keys))
        return count * KEY_TOKENS

    def sent(self, keys: Sequence[bytes], name: str) -> None:
        """The prompt went to the replica ``name``."""
        seen = self._seen.setdefault(name, OrderedDict())
        # The first keys last: without them, those that follow are not found.
        for key in reversed(keys):
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > self._remembered:
            seen.popitem(last=False)

    def keep(self, names: Sequence[str]) -> None:
        """Forget all replicas but ``names``."""
        for name in self._seen.keys() - set(names):
            del self._seen[name]
