"""How often whoever waits for a step looks whether it is computed."""

from dataclasses import replace

import pytest
import torch

from engine.runner import launched_step
from engine.runner.launched_step import LaunchedStep, PromptResults
from engine.runner.step_buffer import StepBuffer


class Clock:
    """Time that passes while somebody sleeps, and an event that has passed after ``takes`` seconds."""

    def __init__(self, takes):
        self.now, self.takes, self.looks = 0.0, takes, 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def record(self):
        pass

    def query(self):
        self.looks += 1
        return self.now >= self.takes

    def synchronize(self):
        self.now = max(self.now, self.takes)


@pytest.mark.parametrize(("takes", "looks"), [(0.0, 1), (2e-3, 42), (0.2, 300)])
def test_long_steps_take_few_looks(monkeypatch, takes, looks):
    """And each is noticed soon: by 50 µs, or by a fiftieth of its time."""
    clock = Clock(takes)
    monkeypatch.setattr(launched_step, "time", clock)
    buffer = StepBuffer(8, 4, torch.device("cpu"))
    memory = replace(buffer.host_memory(), event=clock)
    nothing = PromptResults([], [], [])
    step = LaunchedStep(torch.arange(3), None, nothing, memory, buffer.give_back, idle_wait=True)
    assert step.result().tokens.tolist() == [0, 1, 2]
    assert clock.looks <= looks
    assert clock.now - takes <= max(5.1e-5, 0.021 * takes)
