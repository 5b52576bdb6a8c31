"""Memory for the arrays of a step: of the device, to which they come in one copy, and of the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.transfers import staging, upload

#: Numbers beside a step's inputs: of forced tokens, for example.
_ROOM = 1 << 16
#: Most changes of the state that a step brings in the buffer, such as the blocks of admitted requests.
MOST_CHANGES = 1 << 13


@dataclass(slots=True)
class HostMemory:
    """Pinned memory of a step that is not computed yet, and the event behind it. To ask the allocator for new
    memory at each step would take the host longer than the copies do.

    Attributes:
        given: int64, from which the step's arrays are copied to the device; ``given_array`` is the same.
        tokens: int64 ``(num_slots,)``, to which its sampled tokens are copied; ``tokens_array`` is the same.
        event: None on a CPU.
    """

    given: torch.Tensor
    given_array: np.ndarray
    tokens: torch.Tensor
    tokens_array: np.ndarray
    event: torch.cuda.Event | None


class StepBuffer:
    """Device memory for the arrays of one step after the other, which stays where it is. Captured graphs read
    it, and each copy comes after the work that reads the last one.

    Args:
        size: most numbers of a step's inputs. Other arrays share the memory while there is room.
        num_slots: most tokens that a step samples.

    Attributes:
        changes: int64, see :func:`engine.kernels.decode_state.write_changes`: the latest ones.
        numbers: int64 ``(size + room,)``; a step's inputs come first. They lie behind the changes.
    """

    def __init__(self, size: int, num_slots: int, device: torch.device) -> None:
        # An even number before the inputs: kernels are compiled for addresses that are multiples of 16 bytes.
        self._inputs, self._num_slots, self._first = size, num_slots, 2 * MOST_CHANGES + 2
        self._held = torch.zeros(self._first + size + _ROOM, dtype=torch.int64, device=device)
        self.changes, self.numbers = self._held[: self._first], self._held[self._first :]
        self._free: list[HostMemory] = []

    def host_memory(self) -> HostMemory:
        """Memory for one step."""
        if self._free:
            return self._free.pop()
        device = self._held.device
        given = staging((len(self._held),), torch.int64, device)
        tokens = staging((self._num_slots,), torch.int64, device)
        event = torch.cuda.Event() if device.type == "cuda" else None
        return HostMemory(given, given.numpy(), tokens, tokens.numpy(), event)

    def give_back(self, memory: HostMemory) -> None:
        """Use ``memory`` again: the device has computed its step. After a step that raised it is dropped."""
        self._free.append(memory)

    def send(
        self, memory: HostMemory, changes: np.ndarray, inputs: np.ndarray, others: dict[str, np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """Bring int64 arrays to the device, all in one copy if they fit.

        Args:
            memory: of the step.
            changes: ``(2, n)``, targets and values, at most :data:`MOST_CHANGES`.
            inputs: ``(n,)``, come to the front; if there are none, the present ones stay.
            others: arrays of any shape.

        Returns:
            ``others``, valid until the next call.
        """
        assert inputs.size <= self._inputs and changes.shape[1] <= MOST_CHANGES
        rest = sum(array.size for array in others.values())
        if not (changes.size or inputs.size or rest):
            return {}
        first = start = self._first - changes.size - 1
        # Inputs that stay must not be overwritten.
        together = bool(inputs.size) and inputs.size + rest <= len(self.numbers)
        parts = [changes, np.array([changes.shape[1]], np.int64), inputs]
        start += sum(part.size for part in parts)
        count = start - first
        if together:
            parts += others.values()
            count += rest
        np.concatenate([part.reshape(-1) for part in parts], out=memory.given_array[:count])
        self._held[first : first + count].copy_(memory.given[:count], non_blocking=True)
        if not together:
            arrays = {name: np.ascontiguousarray(array) for name, array in others.items()}
            return {name: upload(array, self._held.device) for name, array in arrays.items()}
        found = {}
        for name, array in others.items():
            # One call for each view: slices and views would take several.
            found[name] = self._held.as_strided(array.shape, _strides(array.shape), start)
            start += array.size
        return found


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous array."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return strides[::-1]


def packed_changes(changes: np.ndarray, device: torch.device) -> torch.Tensor:
    """More ``changes`` than a :class:`StepBuffer` takes, as a tensor for
    :func:`engine.kernels.decode_state.write_changes`."""
    return upload(np.append(changes.reshape(-1), changes.shape[1]), device)
