"""Bounds the digits of numbers in JSON answers.

A JSON number may have any number of digits, and models sometimes repeat one until their answer is cut off.
The grammar can't bound them: llguidance 1.9 drops exponents as soon as a number has bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Digits that a number may have in a row. A double has 17 that count, and an integer of 64 bits has 20.
MAX_DIGITS = 20

_IN_STRING, _ESCAPED = -1, -2
_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = frozenset(b"0123456789")


def advance(state: int, piece: bytes) -> int:
    """Follow a piece of JSON text.

    Args:
        state: digits just before the piece that stand in a row outside of strings; 0 at the start, less than
            0 within a string.

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
        else:
            state = _IN_STRING if byte == _QUOTE else 0
    return state


class DigitBound:
    """Tokens that don't go on with a number's digits.

    Args:
        token_bytes: text of each token.
        width: words of 32 tokens in a row of a mask.
    """

    def __init__(self, token_bytes: Sequence[bytes], width: int) -> None:
        self.token_bytes = token_bytes
        bits = np.ones(width * 32, np.uint8)
        bits[[token for token, piece in enumerate(token_bytes) if piece[:1].isdigit()]] = 0
        self.others = np.packbits(bits, bitorder="little").view(np.int32)
