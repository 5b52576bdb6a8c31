"""How the frames of a file are shown: turned, mirrored, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from av.sidedata.sidedata import Type


@dataclass(frozen=True, slots=True)
class Display:
    """What a player does to stored frames.

    Attributes:
        turned: rows become columns, before anything else.
        right_to_left, bottom_up: columns or rows come in the opposite order.
    """

    turned: bool = False
    right_to_left: bool = False
    bottom_up: bool = False

    @classmethod
    def of(cls, frame: Any) -> Self:
        """The display matrix of PyAV's ``frame``, rounded to the nearest quarter turn.

        The matrix has rows ``(a, b, u)``, ``(c, d, v)`` and ``(x, y, w)``: a pixel at ``(p, q)``, with q
        downwards, is shown at ``(a p + c q + x, b p + d q + y)`` (ISO/IEC 14496-12, 8.3.2). Its angle alone,
        ``frame.rotation``, is no measure of a mirrored frame: it gives half a turn for one that is mirrored
        from left to right, and none for one that is upside down.
        """
        entry = frame.side_data.get(Type.DISPLAYMATRIX)
        if entry is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels`` of a frame ``(height, width, 3)`` as they are shown; a view of them."""
        if self.turned:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.bottom_up else 1, :: -1 if self.right_to_left else 1]
