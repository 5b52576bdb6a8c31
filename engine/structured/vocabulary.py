"""A vocabulary as llguidance takes it: the true bytes of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from engine.text.segmentation import Segmenter


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens over which masks are computed.

    Attributes:
        token_bytes: bytes of text by token id, as many as there are logits; empty where a token gives none.
        control: names of control tokens by id. A grammar reaches them by their name or id alone.
        eos_ids: control tokens that end an answer, at least one.
        spell: token ids whose bytes are the beginning of a text, as far as its first token depends on it.
        complete: whether all texts can be spelled, since every byte has a token.
    """

    token_bytes: Sequence[bytes]
    control: dict[int, str]
    eos_ids: Sequence[int]
    spell: Callable[[str], list[int]]
    complete: bool

    def as_json(self) -> dict[str, Any]:
        """All but :attr:`spell`, as data for :meth:`from_json`."""
        return {
            "token_bytes": [piece.decode("latin-1") for piece in self.token_bytes],
            "control": list(self.control.items()),
            "eos_ids": list(self.eos_ids),
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Vocabulary:
        """The vocabulary that :meth:`as_json` has described; it spells texts in the fewest tokens."""
        pieces = [piece.encode("latin-1") for piece in data["token_bytes"]]
        segmenter = Segmenter(pieces)

        def spell(text: str) -> list[int]:
            return segmenter.fewest(segmenter.beginning(text).encode())

        return cls(pieces, dict(data["control"]), data["eos_ids"], spell, data["complete"])

    def for_llguidance(self) -> llguidance.LLTokenizer:
        """Takes about a second for 150 000 tokens."""
        wrapper = llguidance.TokenizerWrapper(_Wrapped(self))
        return llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_ids))


class _Wrapped:
    """The attributes that llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spell = vocabulary.spell
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = list(vocabulary.control)
        self.tokens = [
            vocabulary.control[token].encode() if token in vocabulary.control else piece
            for token, piece in enumerate(vocabulary.token_bytes)
        ]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # llguidance tries bytes first
            raise TypeError("a text is spelled, not bytes")
        return self._spell(text)
