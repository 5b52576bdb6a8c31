"""A rank beyond 0 gives the memory of its steps back, as rank 0 does."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from engine.executor import worker


def test_a_step_gives_its_memory_back_once_it_is_computed(monkeypatch):
    """And none that is not computed yet is waited for."""
    monkeypatch.setattr(worker, "BatchReceiver", lambda: SimpleNamespace(batch=lambda message: message.step))
    steps = [Mock(ready=Mock(return_value=number == 3)) for number in range(4)]
    seen = []

    def receive():
        seen.append([step.result.call_count for step in steps])
        if len(seen) == 3:
            steps[0].ready.return_value = True
        if len(seen) == 4:
            steps[1].ready.return_value = steps[2].ready.return_value = True
        if len(seen) > len(steps):
            raise EOFError
        return SimpleNamespace(step=steps[len(seen) - 1], masked=False)

    with pytest.raises(EOFError):
        worker._run_steps(SimpleNamespace(recv=receive), SimpleNamespace(execute=lambda step, _: step))
    assert seen == [[0] * 4, [0] * 4, [0] * 4, [1, 0, 0, 0], [1] * 4]
