"""HAProxy as Ray Serve is told to start it."""

import asyncio
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.errors import error_body, error_headers
from deployments.ray_serve.haproxy import MESSAGE
from engine.errors import Unavailable
from tests.serving import ROOT, UNDER_LOAD, free_port, haproxy_program, wait_until

#: Clients that leave. With splicing HAProxy misses one in four of them.
CLIENTS = 40
CONFIG = """
global
    tune.bufsize {bufsize}
defaults
    mode http
    timeout connect 60s
    timeout client 600s
    timeout server 600s
    {options}
    option redispatch 1
    retry-on {retry_on}
    errorfile 503 {errors}
frontend in
    bind 127.0.0.1:{port}
    default_backend out
backend out
    http-reuse always
    {servers}
"""


class SilentServer:
    """Reads requests and answers nothing.

    Attributes:
        open: paths of the requests whose connection is open.
        port: where it listens.
    """

    def __init__(self) -> None:
        self.open: set[str] = set()

    async def __aenter__(self) -> "SilentServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = ""
        try:
            path = (await reader.readline()).decode().split()[1]
            self.open.add(path)
            while await reader.read(1 << 16):
                pass
        except (ConnectionError, IndexError):
            pass
        finally:
            self.open.discard(path)
            writer.close()


def options_of_ray_serve() -> list[str]:
    """The options that Ray Serve gives HAProxy."""
    return re.findall(r"^    (option \S+)$", HAPROXY_CONFIG_TEMPLATE.split("frontend")[0], re.MULTILINE)


async def until_open(port: int) -> None:
    """Wait until a server listens on the port."""
    while True:
        with suppress(ConnectionError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)


@contextmanager
def haproxy(folder: Path, *ports: int, bufsize: int = 16384) -> Iterator[int]:
    """HAProxy with Ray Serve's options in front of the servers at ports. Yields HAProxy's port.

    Args:
        bufsize: bytes of its buffers; the default is that of Ray Serve.
    """
    port = free_port()
    config = folder / "haproxy.cfg"
    options = "\n    ".join(options_of_ray_serve())
    # As Ray Serve writes it.
    errors = folder / "500.http"
    errors.write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    servers = "\n    ".join(f"server at-{each} 127.0.0.1:{each}" for each in ports)
    retry_on = UNDER_LOAD["RAY_SERVE_HAPROXY_RETRY_ON"]
    config.write_text(
        CONFIG.format(
            bufsize=bufsize, options=options, retry_on=retry_on, errors=errors, port=port, servers=servers
        )
    )
    process = subprocess.Popen([haproxy_program(folder), "-db", "-f", config])
    try:
        yield port
    finally:
        process.kill()
        process.wait()


async def leave_one_by_one(server: SilentServer, port: int) -> None:
    """Send requests from clients that leave once the server has them. The server must see each leave."""
    await asyncio.wait_for(until_open(port), 120)
    for number in range(CLIENTS):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b"x" * (10 if number % 2 else 30_000)
        head = f"POST /{number} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        writer.write(body)
        await wait_until(lambda path=f"/{number}": path in server.open)
        writer.close()
        await wait_until(lambda: not server.open)


async def test_no_client_leaves_unnoticed(tmp_path):
    assert {"option abortonclose", "option splice-request"} <= {*options_of_ray_serve()}
    async with SilentServer() as server:
        with haproxy(tmp_path, server.port) as port:
            await leave_one_by_one(server, port)


@pytest.mark.parametrize(("size", "bufsize"), [(100, 16384), (1_000_000, 1 << 20)])
async def test_requests_of_a_server_that_dies_go_to_another(tmp_path, size, bufsize):
    """Headers and body come apart, as OpenAI's client sends them. HAProxy keeps what its buffer holds."""

    async def read(reader: asyncio.StreamReader) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(size)

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await read(reader)
        writer.close()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await read(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with (
        await asyncio.start_server(dies, "127.0.0.1", 0) as first,
        await asyncio.start_server(answers, "127.0.0.1", 0) as second,
    ):
        ports = [each.sockets[0].getsockname()[1] for each in (first, second)]
        with haproxy(tmp_path, *ports, bufsize=bufsize) as port:
            await asyncio.wait_for(until_open(port), 120)
            for _ in range(8):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % size)
                await asyncio.sleep(0.05)
                writer.write(b"x" * size)
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                writer.close()


async def test_bodies_of_clients_that_offer_another_protocol_arrive(tmp_path):
    """Java's client offers HTTP/2 in this way. Without HAProxy, uvicorn drops the body."""

    async def count(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        length = [(b"content-length", b"%d" % len(str(size)))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": str(size).encode()})

    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAAB"}
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(count, http="httptools", lifespan="off", log_level="error"))
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        found = {}
        with haproxy(tmp_path, bound.getsockname()[1]) as port:
            await asyncio.wait_for(until_open(port), 120)
            await wait_until(lambda: server.started)
            for name, there in (("alone", bound.getsockname()[1]), ("behind", port)):
                async with httpx.AsyncClient(timeout=120) as client:
                    answer = await client.post(f"http://127.0.0.1:{there}/", content=b"x" * 7, headers=offer)
                    found[name] = answer.text
        server.should_exit = True
        await serving
    assert found == {"alone": "0", "behind": "7"}


async def test_its_own_errors_are_those_of_the_api(tmp_path):
    """Nothing listens behind it."""
    error = Unavailable(MESSAGE)
    with haproxy(tmp_path, free_port()) as port:
        await asyncio.wait_for(until_open(port), 120)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            answer = await client.post("/v1/chat/completions", json={})
    assert answer.status_code == error.status
    assert answer.json() == error_body(error)
    assert answer.headers["retry-after"] == error_headers(error)["Retry-After"]


def test_the_image_starts_this_program():
    dockerfile = (ROOT / "k8s" / "image" / "Dockerfile").read_text()
    assert "RAY_SERVE_HAPROXY_BINARY_PATH=/opt/venv/bin/sightline-haproxy" in dockerfile
