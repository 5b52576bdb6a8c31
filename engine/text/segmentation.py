"""Texts cut into tokens by the tokens' bytes alone, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

#: Characters to cut beyond the longest token, where the first token alone counts.
_LOOKAHEAD = 1024


class Segmenter:
    """Cuts bytes into tokens of a vocabulary. Thread-safe.

    Args:
        token_bytes: bytes by token id; an id without bytes is never used.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self.longest = max(map(len, token_bytes), default=0)

    @cached_property
    def _ids(self) -> dict[bytes, list[int]]:
        """Ids by their bytes. Several may share them, as ``A`` and ``<0x41>`` do."""
        found: dict[bytes, list[int]] = {}
        for token, piece in enumerate(self._token_bytes):
            if piece:
                found.setdefault(piece, []).append(token)
        return found

    def beginning(self, text: str) -> str:
        """Return the prefix of ``text`` on which the choice of its first token can depend."""
        return text[: _LOOKAHEAD + 4 * self.longest]

    @cached_property
    def cuts_all(self) -> bool:
        """True if every byte has a token of its own, so that any text can be cut."""
        return all(bytes([byte]) in self._ids for byte in range(256))

    def can_cut(self, data: bytes, allowed: frozenset[int] | None = None) -> bool:
        """Return whether tokens, of ``allowed`` alone if given, make up the whole of ``data``."""
        if allowed is None and self.cuts_all:
            return True
        reachable = bytearray(len(data) + 1)
        reachable[0] = 1
        for start in range(len(data)):
            if not reachable[start]:
                continue
            for end in range(start + 1, min(start + self.longest, len(data)) + 1):
                ids = self._ids.get(data[start:end], ())
                if ids and (allowed is None or not allowed.isdisjoint(ids)):
                    reachable[end] = 1
        return bool(reachable[-1])

    def fewest(self, data: bytes) -> list[int]:
        """The fewest tokens that make up ``data``, or as much of its beginning as can be cut."""
        counts: list[int | None] = [0, *[None] * len(data)]
        last = [0] * (len(data) + 1)
        for start, count in enumerate(counts):
            if count is None:
                continue
            for end in range(start + 1, min(start + self.longest, len(data)) + 1):
                known = counts[end]
                if (known is None or known > count + 1) and (ids := self._ids.get(data[start:end])):
                    counts[end], last[end] = count + 1, ids[0]
        end = max(index for index, count in enumerate(counts) if count is not None)
        found: list[int] = []
        while end:
            found.append(last[end])
            end -= len(self._token_bytes[last[end]])
        return found[::-1]
