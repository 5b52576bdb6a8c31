"""Token ids whose bytes are exactly a given text, as constrained decoding needs them."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

from engine.text.segmentation import Segmenter
from engine.text.tokenizer import Tokenizer


class Speller:
    """Spells texts in tokens whose bytes are exactly the text, without any special token. Thread-safe.

    A tokenizer may change a text before it cuts it (NFC, a space in front), so that the bytes of its tokens
    differ from the text. Such a text is cut by the tokens' bytes instead.

    Args:
        tokenizer: the model's.
        num_tokens: width of the logits; ids beyond the vocabulary have no bytes.
        control_ids: ids that never stand for text, besides the special ones: those that end an answer.

    Attributes:
        control_ids: special tokens and the given ids.
        token_bytes: bytes of text by token id; empty for control ids and for ids without a token.
    """

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, control_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.control_ids = tokenizer.special_ids | control_ids
        self.token_bytes: list[bytes] = [
            b"" if token in self.control_ids else tokenizer.token_bytes(token) for token in range(num_tokens)
        ]
        self.segmenter = Segmenter(self.token_bytes)
        self._spell = lru_cache(256)(self._spell_uncached)

    def spell(self, text: str) -> list[int]:
        """Ids whose bytes joined are ``text``: those of the tokenizer where they are exact, else the fewest
        that are. Only the beginning of a long text is spelled; where the vocabulary can't go on, the ids end.
        """
        return list(self._spell(self.segmenter.beginning(text)))

    @cached_property
    def _added(self) -> dict[str, int]:
        """Added tokens that stand for text, such as ``<think>`` of some models."""
        added = self._tokenizer.added_tokens.items()
        return {token.content: i for i, token in added if i not in self.control_ids and token.content}

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def _spell_uncached(self, text: str) -> tuple[int, ...]:
        found: list[int] = []
        for piece in self._added_pattern.split(text):
            if piece in self._added:
                found.append(self._added[piece])
            else:
                found += self._tokenizer.encode_piece(piece)
        data = text.encode()
        if all(self.token_bytes[i] for i in found) and b"".join(self.token_bytes[i] for i in found) == data:
            return tuple(found)
        return tuple(self.segmenter.fewest(data))
