import numpy as np
import pytest

from deployments.ray_serve.frames import Frames, framed

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
MESSAGES = [
    ("one", PIXELS, {"places": np.arange(5.0)}),
    "text",
    [np.zeros((0, 3)), np.asfortranarray(PIXELS[0]), PIXELS[:, ::2]],
    [],
]


@pytest.mark.parametrize("size", [1, 3, 100, 10_000])
def test_messages_are_whole_however_their_bytes_come(size):
    data, frames = b"".join(part for message in MESSAGES for part in framed(message)), Frames()
    starts = range(0, len(data), size)
    found = [message for start in starts for message in frames.cut(data[start : start + size])]
    np.testing.assert_equal(found, MESSAGES)
    assert found[0][1].flags.writeable


@pytest.mark.parametrize("message", [b"x" * 1000, np.zeros(1000, np.uint8)])
def test_a_message_whose_length_would_be_read_as_another_is_refused(message, monkeypatch):
    monkeypatch.setattr("deployments.ray_serve.frames._WITH_ARRAYS", 1 << 9)
    with pytest.raises(OverflowError):
        framed(message)


def test_arrays_are_sent_from_where_they_lie():
    parts = framed(MESSAGES[0])
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), PIXELS) for part in parts)
