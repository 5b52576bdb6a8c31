"""Processes of ranks are started as their host needs it."""

import psutil
import pytest
import torch

from engine.executor.launch import LocalLauncher


@pytest.mark.parametrize(("stated", "ranks", "share"), [("8", 3, "2"), (None, 3, "2"), ("2", 3, "1")])
def test_ranks_share_the_threads_of_their_host(monkeypatch, stated, ranks, share):
    if stated is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
    # What torch made of the variable when it was imported.
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(stated or 8))
    launcher = LocalLauncher()
    try:
        connections = launcher.start(ranks)
        assert len(connections) == ranks - 1
        children = psutil.Process().children()
        started = [each for each in children if "engine.executor.worker" in each.cmdline()]
        assert [each.environ()["OMP_NUM_THREADS"] for each in started] == [share] * (ranks - 1)
    finally:
        launcher.kill()
        launcher.stop()
