"""Texts of single tokens that join up to the text they are part of."""

from __future__ import annotations

import codecs
from collections.abc import Collection

from engine.text.tokenizer import Tokenizer


class TokenTexts:
    """Text and bytes of a growing sequence's tokens, one after the other.

    A token may hold a part of a character. Its text is what it completes: the parts before have none. Joined
    texts and joined bytes are those of the sequence, unless it ends within a character.

    Args:
        tokenizer: the model's.
        at_start: the sequence begins a text: some decoders drop a leading space there.
        skipped: ids that add nothing to the text. Their own text is the token's name.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, at_start: bool = False, skipped: Collection[int] = frozenset()
    ) -> None:
        self._tokenizer, self._at_start, self._skipped = tokenizer, at_start, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of the next token; no bytes where it adds nothing."""
        piece = self._piece(token)
        self._at_start = self._at_start and token in self._skipped
        return (self._decoder.decode(piece), piece) if piece else (self.name(token), b"")

    def look(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of ``token`` if it were the next."""
        piece = self._piece(token)
        if not piece:
            return self.name(token), b""
        state = self._decoder.getstate()
        text = self._decoder.decode(piece)
        self._decoder.setstate(state)
        return text, piece

    def name(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        return self._tokenizer.decode([token])

    def _piece(self, token: int) -> bytes:
        if token in self._skipped:
            return b""
        token_bytes = self._tokenizer.first_token_bytes if self._at_start else self._tokenizer.token_bytes
        return token_bytes(token)
