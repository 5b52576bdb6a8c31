"""Reads safetensors files that callers send, with numpy alone. Nothing in them is executed."""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InvalidRequest

#: By the format's name of each dtype that is taken: our name, and numpy's dtype. bfloat16 comes as its bits.
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
}
#: Longest header. That of a file with one tensor has some hundred bytes.
_MAX_HEADER = 1 << 16
_MAX_DIMS = 8
_LENGTH = struct.Struct("<Q")
#: Beginnings of the files that ``torch.save`` and ``pickle`` write.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file with one floating-point tensor.

    Attributes:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        shape: of the tensor.
        start: offset of its data in the file.
        size: bytes of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @classmethod
    def announced(cls, payload: str, where: str) -> TensorFile:
        """The file that base64 text holds, by its header; the data are not decoded.

        Raises:
            InvalidRequest: it is no such file, or doesn't have the length that its header announces.
        """
        size, start = base64_size(payload), decode_base64(payload[:16], where)
        if start.startswith(_PICKLES):
            raise InvalidRequest(
                f"{where} is a file of torch.save or pickle, which may run code when it is read; send a "
                "safetensors file.",
                param=where,
            )
        end = _LENGTH.size + (_LENGTH.unpack_from(start)[0] if len(start) >= _LENGTH.size else size)
        if end > min(_MAX_HEADER, size):
            raise InvalidRequest(f"{where} is no safetensors file in base64.", param=where)
        return cls.parsed(decode_base64(payload[: -(-end // 3) * 4], where)[:end], size, where)

    @classmethod
    def parsed(cls, head: bytes, size: int, where: str) -> TensorFile:
        """The file of ``size`` bytes that begins with ``head``, which holds the header; errors as
        :meth:`announced`."""
        start = _LENGTH.size + _LENGTH.unpack_from(head)[0]
        try:
            entries = json.loads(head[_LENGTH.size : start])
            entries.pop("__metadata__", None)
            ((_, entry),) = entries.items()
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            dtype, layout = _DTYPES[entry["dtype"]]
            numbers = (first, last, *shape)
            if len(shape) > _MAX_DIMS or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InvalidRequest(
                f"{where} must be a safetensors file with one tensor of float32, float16 or bfloat16.",
                param=where,
            ) from None
        if first or last != math.prod(shape) * layout.itemsize or start + last != size:
            raise InvalidRequest(
                f"{where}: the file has {size} bytes, which doesn't fit the tensor {shape} of {dtype} that "
                "its header announces.",
                param=where,
            )
        return cls(dtype, shape, start, size)

    def tensor(self, data: bytes) -> np.ndarray:
        """The tensor of the decoded file, as a view of it; bfloat16 as uint16."""
        layout = next(layout for dtype, layout in _DTYPES.values() if dtype == self.dtype)
        return np.frombuffer(data, layout, math.prod(self.shape), self.start).reshape(self.shape)


def base64_size(payload: str) -> int:
    """Number of bytes that base64 text stands for."""
    return len(payload) // 4 * 3 - payload[-2:].count("=")


def decode_base64(text: str, where: str) -> bytes:
    """The bytes that base64 text stands for.

    Raises:
        InvalidRequest: it isn't base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{where} is not valid base64.", param=where) from None


def is_finite(tensor: np.ndarray, dtype: str) -> bool:
    """Return whether all numbers of a tensor are finite.

    Args:
        dtype: as in :class:`TensorFile`.
    """
    if dtype != "bfloat16":
        return bool(np.isfinite(tensor).all())
    # Infinities and NaN have all bits of the exponent set.
    exponent = np.uint16(0x7F80)
    return bool(((tensor & exponent) != exponent).all())
