"""Processes of ranks are started as their host needs it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from engine.executor.launch import LocalLauncher
from tests.serving import wait_for


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

        def started() -> list[psutil.Process]:
            # For a moment a new program has no command line yet.
            return [p for p in psutil.Process().children() if "engine.executor.worker" in p.cmdline()]

        wait_for(lambda: len(started()) == ranks - 1)
        assert [each.environ()["OMP_NUM_THREADS"] for each in started()] == [share] * (ranks - 1)
    finally:
        launcher.kill()
        launcher.stop()


SCRIPT = """
from engine.executor.launch import LocalLauncher

launcher = LocalLauncher()
print(launcher.address, flush=True)
input()
"""


def test_a_start_removes_the_places_of_killed_processes_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launcher = LocalLauncher()
    own = Path(urlsplit(launcher.address).path).parent
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def place(process: subprocess.Popen[str]) -> Path:
        assert process.stdout is not None
        return Path(urlsplit(process.stdout.readline().strip()).path).parent

    with start() as killed:
        left = place(killed)
        killed.kill()
    assert left.parent == own.parent == tmp_path and left.is_dir()
    with start() as living:
        used = place(living)
        assert not left.exists() and own.is_dir()
        del launcher
        assert not own.exists()
        launcher = LocalLauncher()
        own = Path(urlsplit(launcher.address).path).parent
        assert sorted(tmp_path.iterdir()) == sorted([own, used])
        # It comes to its end.
        living.communicate("\n", timeout=60)
    assert list(tmp_path.iterdir()) == [own]
    launcher.clear()
    assert not own.exists()
    launcher.clear()
