"""Bounds the digits of numbers in JSON answers.

A JSON number may have any number of digits, and models sometimes repeat one until their answer is cut off.
The grammar can't bound them: llguidance 1.9 drops exponents as soon as a number has bounds.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from string import ascii_letters

import numpy as np

#: Digits that a number may have in a row. A double has 17 that count, and an integer of 64 bits has 20.
MAX_DIGITS = 20

#: Digits of an exponent, so that a number stays within a double's range: 99 at most, or -999 at least.
_EXPONENT, _NEGATIVE_EXPONENT = 2, 3

_IN_STRING, _ESCAPED = -1, -2
_QUOTE, _BACKSLASH = b'"\\'
_POINT = ord(".")

#: Added to the count of digits behind a point or within an exponent.
_FRACTION = 64
_DIGITS = frozenset(b"0123456789")


def advance(state: int, piece: bytes) -> int:
    """Follow a piece of JSON text.

    Args:
        state: digits just before the piece that stand in a row outside of strings; 0 at the start, less than
            0 within a string. Exponents begin as if they had had the digits that they may not have.

    Returns:
        The state behind the piece.
    """
    for byte in piece:
        if state == _IN_STRING:
            state = _ESCAPED if byte == _BACKSLASH else 0 if byte == _QUOTE else _IN_STRING
        elif state == _ESCAPED:
            state = _IN_STRING
        elif byte in _DIGITS:
            state += 1
        elif byte in b"eE" and state > 0:
            state = MAX_DIGITS - _EXPONENT
        elif byte in b"+-" and state == MAX_DIGITS - _EXPONENT:
            state = MAX_DIGITS - (_NEGATIVE_EXPONENT if byte == ord("-") else _EXPONENT)
        else:
            state = _IN_STRING if byte == _QUOTE else 0
    return state


def advance_within(state: int, piece: bytes) -> int:
    """Follow a piece of a text of which JSON is a part: where its strings are isn't known.

    Args:
        state: as of :func:`advance`, but never less than 0; :data:`_FRACTION` more behind a point and in an
            exponent.

    Returns:
        The state behind the piece.
    """
    for byte in piece:
        if byte in _DIGITS:
            # A text may have any number of digits.
            state = min(state + 1, _FRACTION - 1) if state < _FRACTION else min(state + 1, 2 * _FRACTION - 1)
        elif byte == _POINT and 0 < state < _FRACTION:
            state = _FRACTION
        elif byte in b"eE" and state > 0:
            state = _FRACTION + MAX_DIGITS - _EXPONENT
        elif byte in b"+-" and state == _FRACTION + MAX_DIGITS - _EXPONENT:
            digits = _NEGATIVE_EXPONENT if byte == ord("-") else _EXPONENT
            state = _FRACTION + MAX_DIGITS - digits
        else:
            state = 0
    return state


class DigitBound:
    """Tokens that don't take a number beyond its digits, in an answer that is JSON.

    Args:
        token_bytes: text of each token.
        width: words of 32 tokens in a row of a mask.
    """

    def __init__(self, token_bytes: Sequence[bytes], width: int) -> None:
        self._token_bytes = token_bytes
        self._masks: dict[int, np.ndarray] = {}
        self._leading = np.zeros(width * 32, np.uint8)
        self._leading[: len(token_bytes)] = [_leading_digits(piece) for piece in token_bytes]
        self._longest = int(self._leading.max())

    def after(self, state: int, token: int) -> int:
        """The state behind a token. An answer begins with 0."""
        return advance(state, self._token_bytes[token])

    def mask(self, state: int, row: np.ndarray) -> np.ndarray | None:
        """The tokens with no more digits than are left; None where all may come.

        Args:
            row: (width,) int32, the tokens that the grammar lets follow.

        Returns:
            (width,) int32.
        """
        return None if state < 0 else self._at_most(MAX_DIGITS - state)

    def _at_most(self, digits: int) -> np.ndarray | None:
        digits = max(digits, 0)
        if digits >= self._longest:
            return None
        if digits not in self._masks:
            bits = (self._leading <= digits).astype(np.uint8)
            self._masks[digits] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._masks[digits]


class DigitBoundWithin(DigitBound):
    """The same in an answer of which JSON is a part, such as a call behind a text.

    The grammar tells a number from other digits: neither the quote that ends a string may follow it nor a
    letter, but for that of an exponent, unless the number has begun one or has bounds. Integers within such
    answers have bounds, see :func:`engine.parsers.arguments.with_bounded_integers`.
    """

    def __init__(self, token_bytes: Sequence[bytes], width: int) -> None:
        super().__init__(token_bytes, width)
        letters = {letter.encode() for letter in ascii_letters}
        exponents = {b"e", b"E"}
        # (width,) int32 each.
        self._text = self._having(letters - exponents | {b'"'})
        self._exponent = self._having(exponents)

    def after(self, state: int, token: int) -> int:
        return advance_within(state, self._token_bytes[token])

    def mask(self, state: int, row: np.ndarray) -> np.ndarray | None:
        found = self._at_most(MAX_DIGITS - state % _FRACTION)
        if found is None or not self._text.any() or (row & self._text).any():
            return None
        return found if state >= _FRACTION or (row & self._exponent).any() else None

    def _having(self, pieces: Container[bytes]) -> np.ndarray:
        """The tokens whose text is one of ``pieces``, as a mask."""
        bits = np.zeros(len(self._leading), np.uint8)
        bits[: len(self._token_bytes)] = [piece in pieces for piece in self._token_bytes]
        return np.packbits(bits, bitorder="little").view(np.int32)


def _leading_digits(piece: bytes) -> int:
    return min(len(piece) - len(piece.lstrip(b"0123456789")), MAX_DIGITS + 1)
