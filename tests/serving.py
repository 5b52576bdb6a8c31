"""Running the application for tests."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.orphans import end_with_this_process
from benchmarks.processes import cluster_of
from deployments.config import AppConfig

ROOT = Path(__file__).parent.parent

#: The README's environment for load: HAProxy in front, Unix sockets or gRPC between the stages.
UNDER_LOAD = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.ray_serve.doorstep.middlewares",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}


def free_port() -> int:
    """A free port of this machine, for a server that starts later.

    It is below the ports that Linux gives to connections and to servers that ask for any, so nothing takes it
    meanwhile by chance.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port was found")


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Poll until ``condition`` is true, and return what it gave; fail when the time is up.

    The longer the wait, the fewer polls a second: conditions often ask other processes.
    """
    deadline, pause = time.monotonic() + seconds, 0.02
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.3)
    return found


async def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait as :func:`wait_for` does, without blocking the event loop."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)
    return found


@contextmanager
def serve_files(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve a folder over plain HTTP meanwhile; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Print nothing where a client has left."""

    server = Server((host, 0), partial(Handler, directory=str(folder)))
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


def changed_config(**engine: Any) -> AppConfig:
    """The shipped configuration with other values for its model's engine."""
    args = app_args()
    args["models"][0]["engine"] |= engine
    return AppConfig.model_validate(args)


def tested_args(site: str) -> dict[str, Any]:
    """Arguments with a second model that makes embeddings; images may be fetched from ``site``."""
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
    """The application in processes of its own, on a Ray cluster of its own.

    Attributes:
        root: its address.
        pictures: a folder from which it may fetch, under the address ``site``.
        cluster: the address of its Ray cluster. Every call of Ray must name it: others may run here.
        process: the process of ``serve run``.
        log: its output, and that of the replicas.
        config: the file of its configuration.
    """

    root: str
    pictures: Path
    site: str
    cluster: str
    process: psutil.Process
    log: Path
    config: Path

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"

    def stage(self, name: str) -> Any:
        """A handle of one of pocket's deployments."""
        from ray import serve

        return serve.get_deployment_handle(f"{name}:pocket", "sightline").options(_by_reference=True)

    def engine_metrics(self) -> dict[str, Any]:
        return self.stage("LanguageModel").metrics.remote().result(timeout_s=120)

    def wait_until_idle(self) -> None:
        """Until the engine holds nothing of any request; fails if it ends up holding something."""
        wait_for(lambda: self.stage("LanguageModel").is_idle.remote().result(timeout_s=120))


def stages_of(model: dict[str, Any]) -> dict[str, Any]:
    """The application that has the stages of a model, which is told of it; both as in the configuration."""
    name = model["name"].replace("/", "-")
    args = {"models": [deepcopy(model)]}
    model["application"] = name
    return {"name": name, "route_prefix": None, "import_path": "deployments.app:build_stages", "args": args}


@contextmanager
def served_application(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] = lambda args: None,
    *,
    environment: Mapping[str, str] = {},
    connect: bool = True,
) -> Iterator[Served]:
    """``serve_config.yaml``'s application, run by ``serve run`` meanwhile.

    The stages of a second model are an application of their own.

    Args:
        folder: for the configuration, the log and the images.
        change: changes the application's arguments.
        environment: environment variables of ``serve run``.
        connect: connect this process to the Ray cluster. It can be connected to one at a time.
    """
    import ray

    pictures = folder / "pictures"
    pictures.mkdir()
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    # An address of its own: the machine's usual addresses stay forbidden.
    with serve_files(pictures, "127.0.0.2") as site:
        args = config["applications"][0]["args"] = tested_args(site)
        change(args)
        config["applications"] += [stages_of(model) for model in args["models"][1:]]
        file, log = folder / "serve.yaml", folder / "log"
        file.write_text(yaml.safe_dump(config))
        root = f"http://127.0.0.1:{port}"
        with serve_run(file, log, f"{root}/health", environment) as process:
            served = Served(root, pictures, site, cluster_of(process), process, log, file)
            if not connect:
                yield served
                return
            ray.init(served.cluster, log_to_driver=False)
            try:
                yield served
            finally:
                ray.shutdown()


class SharedApplication:
    """The application that several tests use: started for the first of them, ended after the last.

    Args:
        folder: makes the folder for the configuration, the log and the images.
        options: of :func:`served_application`.
    """

    def __init__(self, folder: Callable[[], Path], **options: Any) -> None:
        self._folder, self._options = folder, options
        self._stack = ExitStack()
        self._served: Served | None = None
        self._failure: BaseException | None = None

    def get(self) -> Served:
        """The application that runs. If its start fails, it is not tried again: all tests fail at once."""
        if self._failure is not None:
            raise self._failure
        if self._served is None:
            try:
                self._served = self._stack.enter_context(served_application(self._folder(), **self._options))
            except BaseException as error:
                self._failure = error
                raise
        return self._served

    def close(self) -> None:
        """Interrupt the application, which must leave no process behind."""
        self._served = None
        self._stack.close()


def haproxy_program(folder: Path) -> Path:
    """The program ``sightline-haproxy`` in ``folder``, made as an installation of this source makes it."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["sightline-haproxy"]
    module, function = entry.split(":")
    program = folder / "sightline-haproxy"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from {module} import {function}\n{function}()\n"
    )
    program.chmod(0o755)
    return program


@contextmanager
def serve_run(
    config: Path, log: Path, health: str, environment: Mapping[str, str] = {}
) -> Iterator[psutil.Process]:
    """Start ``serve run``, and enter the block once ``health`` answers. After the block the process is
    interrupted; it must end without leaving a process behind."""
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
    first = free_port()
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own metrics, which no test reads, took a quarter of an idle application's time.
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Of two applications on one machine the second would not start with HAProxy's own ports.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        # HAProxy would send its requests to another application's ingress until a replica has found that the
        # port which it was given is taken.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 100),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy_program(config.parent)),
    }
    # Programs other than pytest start applications too.
    end_with_this_process()
    with log.open("w") as output:
        server = subprocess.Popen(
            # A cluster of its own, whatever else runs here.
            [*command, "--address", "local", str(config)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, **variables, **environment},
            start_new_session=True,
            # Shells start background jobs with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    processes: list[psutil.Process] = []
    try:
        wait_for(lambda: server.poll() is not None or answers(health), 400)
        assert server.poll() is None, log.read_text()[-3000:]
        yield psutil.Process(server.pid)
        processes = psutil.Process(server.pid).children(recursive=True)
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(300)
    assert code == 0, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def answers(url: str) -> bool:
    """Return whether a GET of ``url`` gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except OSError:
        return False
