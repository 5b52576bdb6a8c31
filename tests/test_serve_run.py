"""What ``make serve`` runs: a process of its own, and its end."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from tests.serving import ROOT, free_port, wait_for

pytestmark = pytest.mark.ray


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def test_the_example_client_is_answered_and_ctrl_c_leaves_no_process(tmp_path: Path):
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    serve = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
    # A cluster of its own, whatever else runs here.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*serve, "--address", "local", str(tmp_path / "serve.yaml")],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            # Shells start background jobs with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: server.poll() is not None or answers(f"{url}/health"), 120)
        assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        client = [sys.executable, "examples/chat_client.py", "Describe this image."]
        said = subprocess.run(
            [*client, "--base-url", f"{url}/v1"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert "red circle" in said and "blue square" in said
        processes = psutil.Process(server.pid).children(recursive=True)
        assert len(processes) > 5
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(90)
    assert code == 0
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
