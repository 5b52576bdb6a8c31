"""What tests know of the running application."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


async def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """As :func:`wait_for`, for coroutines: the event loop goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)
    return found


@contextmanager
def serve_files(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve a folder over plain HTTP meanwhile; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def app_args() -> dict[str, Any]:
    """The arguments of ``serve_config.yaml``, which is what users start with."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    return config["applications"][0]["args"]


def tested_args(site: str) -> dict[str, Any]:
    """The same with a second model that makes embeddings; images may be fetched from ``site``."""
    args = app_args()
    vectors = {
        "model": "models/pocket-embed",
        "task": "embed",
        "max_model_len": 512,
        "kv_cache_bytes": 16 << 20,
    }
    args["models"].append({"name": "tests/vectors", "engine": vectors})
    host, port = site.removeprefix("http://").split(":")
    args["fetch"] = {"allow_private": [f"{host}/32"], "allowed_ports": [80, int(port)]}
    return args


@dataclass(frozen=True)
class Served:
    """The running application.

    Attributes:
        root: its address.
        pictures: a folder from which it may fetch, as it stands under the address ``site``.
    """

    root: str
    pictures: Path
    site: str

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
        wait_for(lambda: self.stage("LanguageModel").is_idle.remote().result(timeout_s=30))
