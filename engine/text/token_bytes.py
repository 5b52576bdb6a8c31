"""Maps single tokens to the bytes of text that they stand for."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from engine.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes of single tokens, found lazily: vocabularies have 10^5 entries and answers use few of them.

    Attributes:
        ascii: texts of the tokens found so far that are ASCII, by id. Most of a text's tokens are.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.ascii: dict[int, str] = {}
        self._known: dict[int, bytes] = {}
        self._known_first: dict[int, bytes] = {}
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._byte_fallback = "ByteFallback" in kinds and kinds <= {
            "Replace",
            "ByteFallback",
            "Fuse",
            "Strip",
        }
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        self._anchor: tuple[int, str] | None = None

    def of(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to running text; possibly a part of a character, or nothing."""
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = self._find(token_id)
            if piece.isascii():
                self.ascii[token_id] = piece.decode("ascii")
        return piece

    def of_first(self, token_id: int) -> bytes:
        """Return the bytes of a token at the start of a text, where some decoders drop a leading space."""
        piece = self._known_first.get(token_id)
        if piece is None:
            text = self._backend.decode([token_id], skip_special_tokens=False)
            piece = self.of(token_id) if "\ufffd" in text else text.encode()
            self._known_first[token_id] = piece
        return piece

    def _find(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return token.encode()
        if self._byte_fallback:
            if match := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(match[1], 16)])
            for old, new in self._replacements:
                token = token.replace(old, new)
            return token.encode()
        return self._after_anchor(token_id).encode()

    def _after_anchor(self, token_id: int) -> str:
        """Return the text that the decoder adds for the token after other text."""
        if self._anchor is None:
            for candidate in sorted(self._backend.get_vocab(with_added_tokens=False).values()):
                text = self._backend.decode([candidate], skip_special_tokens=False)
                if text.isalnum():
                    self._anchor = (candidate, text)
                    break
            else:
                raise CheckpointError("the tokenizer has no token that decodes to a word")
        anchor, text = self._anchor
        return self._backend.decode([anchor, token_id], skip_special_tokens=False)[len(text) :]


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes, as GPT-2 defined them.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]
