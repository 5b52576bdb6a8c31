"""Bounds the digits of numbers in JSON answers.

A JSON number may have any number of digits, and models sometimes repeat one until their answer is cut off.
The grammar can't bound them: llguidance 1.9 drops exponents as soon as a number has bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Digits that a number may have in a row. A double has 17 that count, and an integer of 64 bits has 20.
MAX_DIGITS = 20

#: Digits of an exponent, so that a number stays within a double's range: 99 at most, or -999 at least.
_EXPONENT, _NEGATIVE_EXPONENT = 2, 3

_IN_STRING, _ESCAPED = -1, -2
_QUOTE, _BACKSLASH = b'"\\'
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


class DigitBound:
    """Tokens that don't take a number beyond its digits.

    Args:
        token_bytes: text of each token.
        width: words of 32 tokens in a row of a mask.
    """

    def __init__(self, token_bytes: Sequence[bytes], width: int) -> None:
        self.token_bytes = token_bytes
        self._masks: dict[int, np.ndarray] = {}
        self._leading = np.zeros(width * 32, np.uint8)
        self._leading[: len(token_bytes)] = [_leading_digits(piece) for piece in token_bytes]
        self._longest = int(self._leading.max())

    def mask(self, state: int) -> np.ndarray | None:
        """(width,) int32: the tokens with no more digits than are left; None where all may come."""
        left = max(MAX_DIGITS - state, 0)
        if state < 0 or left >= self._longest:
            return None
        if left not in self._masks:
            bits = (self._leading <= left).astype(np.uint8)
            self._masks[left] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._masks[left]


def _leading_digits(piece: bytes) -> int:
    return min(len(piece) - len(piece.lstrip(b"0123456789")), MAX_DIGITS + 1)
