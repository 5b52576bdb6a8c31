"""Groups of attention layers that keep the keys and values of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.layers.decoder_config import DecoderConfig

#: Most groups: each has its own block tables.
_MOST_GROUPS = 12
#: A block may exceed its share of all layers by one part in this number.
_PADDING = 12

#: The layers that share a place: one, or several whose keys are as wide as one another's.
Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Groups of attention layers. The layers of a group have the same sliding window, or none.

    Groups have equally many places, except that some may have fewer, so a KV block can serve any group: it
    holds the keys and values of a few tokens in the layers of one group. Most layers take a place each. Where
    some have wider keys than others, several of the others share one.

    Attributes:
        size: places of a block.
        width: numbers of a token's keys that a place has room for, on one rank.
        windows: of each group, in tokens; None where all tokens of a sequence are seen.
        members: the layers in each place of each group.
    """

    size: int
    width: int
    windows: tuple[int | None, ...]
    members: tuple[tuple[Place, ...], ...]

    @classmethod
    def single(cls, config: DecoderConfig, num_ranks: int = 1) -> LayerGroups:
        """Put all layers into one group, which keeps all tokens."""
        places = _places(config, _keeping_layers(config), num_ranks)
        return cls(len(places), _widest(config, num_ranks), (None,), (tuple(places),))

    @classmethod
    def of(cls, config: DecoderConfig, max_model_len: int, num_ranks: int = 1) -> LayerGroups:
        """Divide the layers of a decoder by their windows.

        It stays with a single group if no sequence of up to ``max_model_len`` tokens outgrows a window, or if
        the numbers of layers have no common measure that wastes little memory.

        Args:
            num_ranks: ranks that share the KV heads.
        """
        layers: dict[int | None, list[int]] = {}
        for layer in _keeping_layers(config):
            window = config.window(layer)
            layers.setdefault(None if window is None or window >= max_model_len else window, []).append(layer)
        kinds = {window: _places(config, members, num_ranks) for window, members in layers.items()}
        counts = [len(places) for places in kinds.values()]
        for size in range(min(counts), max(counts) + 1):
            number = sum(-(-count // size) for count in counts)
            padding = size * number - sum(counts)
            if number <= _MOST_GROUPS and padding * _PADDING <= sum(counts):
                return cls._divide(kinds, size, _widest(config, num_ranks))
        return cls.single(config, num_ranks)

    @classmethod
    def _divide(cls, kinds: dict[int | None, list[Place]], size: int, width: int) -> LayerGroups:
        parts = [
            (window, tuple(places[first : first + size]))
            for window, places in kinds.items()
            for first in range(0, len(places), size)
        ]
        windows, members = zip(*parts, strict=True)
        return cls(size, width, windows, members)


def _keeping_layers(config: DecoderConfig) -> list[int]:
    """The layers that have keys and values of their own."""
    attending = (layer for layer in range(config.num_layers) if layer not in config.linear_layers)
    return [layer for layer in attending if config.keys_of(layer) == layer]


def _widest(config: DecoderConfig, num_ranks: int) -> int:
    return max((config.kv_width(layer, num_ranks) for layer in _keeping_layers(config)), default=0)


def _places(config: DecoderConfig, layers: Sequence[int], num_ranks: int) -> list[Place]:
    """Put layers with keys of one width together, as many as have room, in their order."""
    room, places, open_places = _widest(config, num_ranks), list[list[int]](), dict[int, list[int]]()
    for layer in layers:
        width = config.kv_width(layer, num_ranks)
        place = open_places.get(width)
        if place is None or (len(place) + 1) * width > room:
            place = open_places[width] = []
            places.append(place)
        place.append(layer)
    return [tuple(place) for place in places]
