"""Device memory for the arrays of a step, which come from the host in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.transfers import staging

#: Numbers beside a step's inputs: the blocks of many admissions, for example.
_ROOM = 1 << 16


class StepBuffer:
    """Device memory for the arrays of one step after the other, which stays where it is. Captured graphs read
    it, and each copy comes after the work that reads the last one.

    Args:
        size: most numbers of a step's inputs. Other arrays share the memory while there is room.

    Attributes:
        numbers: int64 ``(size + room,)``; a step's inputs come first.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._inputs = size
        self.numbers = torch.zeros(size + _ROOM, dtype=torch.int64, device=device)

    def send(self, inputs: Sequence[np.ndarray], others: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Bring int64 arrays to the device, all in one copy if they fit.

        Args:
            inputs: come to the front, one after the other; without any, the present ones stay.
            others: arrays of any shape.

        Returns:
            ``others``, valid until the next call.
        """
        front = sum(array.size for array in inputs)
        start = front if inputs else self._inputs
        assert start <= self._inputs
        parts = [array.reshape(-1) for array in (*inputs, *others.values())]
        count = sum(part.size for part in parts)
        if not count:
            return {}
        staged = staging((count,), torch.int64, self.numbers.device)
        np.concatenate(parts, out=staged.numpy())
        first = 0 if inputs else start
        if first + count <= len(self.numbers):
            held = self.numbers
            held[first : first + count].copy_(staged, non_blocking=True)
        else:
            held, start = staged.to(self.numbers.device, non_blocking=True), front
            self.numbers[:front].copy_(staged[:front], non_blocking=True)
        found = {}
        for name, array in others.items():
            # One call for each view: slices and views would take several.
            strides = np.array([1, *array.shape[:0:-1]]).cumprod()[::-1].tolist()
            found[name] = held.as_strided(array.shape, strides, start)
            start += array.size
        return found
