import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deployments.ray_serve.frames import Frames, framed

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
#: Longer than what is read at a time, as an array and within the pickle.
LONG = np.arange(1 << 16, dtype=np.uint32)
MESSAGES = [
    ("one", PIXELS, {"places": np.arange(5.0)}),
    "text",
    [np.zeros((0, 3)), np.asfortranarray(PIXELS[0]), PIXELS[:, ::2]],
    [],
    [LONG, "between", LONG[::-1], LONG[1:], PIXELS],
    LONG.tobytes(),
    [LONG[:-1], np.zeros((3, 0))],
    7,
]


def cut(frames: Frames, data: bytes | memoryview, most: int = 1 << 30) -> Iterator[Any]:
    """The messages of ``data``, as a transport brings it: up to ``most`` bytes, as far as there is room."""
    while data:
        room = frames.room()
        count = min(len(room), len(data), most)
        assert count
        room[:count] = data[:count]
        data = data[count:]
        yield from frames.cut(count)


@pytest.mark.parametrize("size", [1, 3, 100, 10_000, 1 << 30])
def test_messages_are_whole_however_their_bytes_come(size):
    # One byte at a time the long ones take seconds.
    messages = MESSAGES if size > 3 else MESSAGES[:4] * 2
    data, frames = b"".join(part for message in messages for part in framed(message)), Frames()
    found = list(cut(frames, memoryview(data), size))
    np.testing.assert_equal(found, messages)
    assert found[0][1].flags.writeable
    # What was read is not kept, nor is the room for it.
    assert frames.room().nbytes == len(frames._buffer) < 1 << 17


def test_the_bytes_of_an_array_come_to_where_they_stay():
    data, frames = b"".join(framed(["before", LONG])), Frames()
    first, rest = data[:1000], memoryview(data)[1000:]
    assert not [*cut(frames, first)]
    room = frames.room()
    (found,) = cut(frames, rest)
    assert np.array_equal(found[1], LONG) and np.shares_memory(np.frombuffer(room, np.uint8), found[1])


def test_a_message_that_cannot_be_read_harms_no_other():
    bad = b"".join(framed([LONG, "x"]))
    bad = bad.replace(pickle.dumps("x", 5)[-5:-2], b"\xff\xff\xff")
    frames = Frames()
    with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError)):
        list(cut(frames, bad))
    assert list(cut(frames, b"".join(framed("next")))) == ["next"]


@pytest.mark.parametrize("message", [b"x" * 1000, np.zeros(1000, np.uint8)])
def test_a_message_whose_length_would_be_read_as_another_is_refused(message, monkeypatch):
    monkeypatch.setattr("deployments.ray_serve.frames._WITH_ARRAYS", 1 << 9)
    with pytest.raises(OverflowError):
        framed(message)


def test_arrays_are_sent_from_where_they_lie():
    parts = framed(MESSAGES[0])
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), PIXELS) for part in parts)
