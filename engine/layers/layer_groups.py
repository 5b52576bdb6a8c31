"""Groups of attention layers that keep the keys and values of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.decoder_config import DecoderConfig

#: Most groups: each has its own block tables.
_MOST_GROUPS = 12
#: A block may exceed its share of all layers by one part in this number.
_PADDING = 12


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Groups of attention layers. The layers of a group have the same sliding window, or none.

    Groups have equally many layers, except that some may have fewer, so a KV block can serve any group: it
    holds the keys and values of a few tokens in the layers of one group.

    Attributes:
        size: layers that a block has room for.
        windows: of each group, in tokens; None where all tokens of a sequence are seen.
        members: the layers of each group.
    """

    size: int
    windows: tuple[int | None, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def single(cls, config: DecoderConfig) -> LayerGroups:
        """Put all layers into one group, which keeps all tokens."""
        layers = _attention_layers(config)
        return cls(len(layers), (None,), (layers,))

    @classmethod
    def of(cls, config: DecoderConfig, max_model_len: int) -> LayerGroups:
        """Divide the layers of a decoder by their windows.

        It stays with a single group if no sequence of up to ``max_model_len`` tokens outgrows a window, or if
        the numbers of layers have no common measure that wastes little memory.
        """
        kinds: dict[int | None, list[int]] = {}
        for layer in _attention_layers(config):
            window = config.window(layer)
            kinds.setdefault(None if window is None or window >= max_model_len else window, []).append(layer)
        counts = [len(layers) for layers in kinds.values()]
        for size in range(min(counts), max(counts) + 1):
            number = sum(-(-count // size) for count in counts)
            padding = size * number - sum(counts)
            if number <= _MOST_GROUPS and padding * _PADDING <= sum(counts):
                return cls._divide(kinds, size)
        return cls.single(config)

    @classmethod
    def _divide(cls, kinds: dict[int | None, list[int]], size: int) -> LayerGroups:
        parts = [
            (window, tuple(layers[first : first + size]))
            for window, layers in kinds.items()
            for first in range(0, len(layers), size)
        ]
        windows, members = zip(*parts, strict=True)
        return cls(size, windows, members)


def _attention_layers(config: DecoderConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(config.num_layers) if layer not in config.linear_layers)
