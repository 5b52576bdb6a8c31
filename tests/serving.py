"""What tests know of the running application."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll until ``condition`` is true, and return what it gave; fail when the time is up."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
    return found


def app_args() -> dict[str, Any]:
    """The arguments of ``serve_config.yaml``, which is what users start with."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    return config["applications"][0]["args"]


@dataclass(frozen=True)
class Served:
    """The running application."""

    root: str

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"

    def stage(self, name: str) -> Any:
        """A handle of one of pocket's deployments."""
        from ray import serve

        return serve.get_deployment_handle(f"{name}:pocket", "sightline").options(_by_reference=True)

    def engine_metrics(self) -> dict[str, Any]:
        return self.stage("LanguageModel").metrics.remote().result(timeout_s=30)

    def wait_until_idle(self) -> None:
        """Until the engine holds nothing of any request; fails if it ends up holding something."""
        wait_for(lambda: self.stage("LanguageModel").check_integrity.remote().result(timeout_s=30))
