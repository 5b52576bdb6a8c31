"""Requests to an application in this process, without sockets, and hosts for it to fetch from."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from deployments.config import AppConfig
from deployments.in_process import LocalApplication


async def post(
    api: Any, body: dict[str, Any], *, path: str = "/v1/chat/completions", patience: float | None = None
) -> tuple[int | None, bytes]:
    """Send a request; the status and body of its answer.

    Args:
        patience: seconds after which the client leaves; the status is None then.
    """
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    status, content = None, bytearray()

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        content.extend(message.get("body", b""))

    try:
        async with asyncio.timeout(patience):
            await api(scope, receive, send)
    except TimeoutError:
        return None, b""
    return status, bytes(content)


def png_url(image: Image.Image) -> str:
    """An image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


@dataclass
class Host:
    """A web server.

    Attributes:
        url: its address.
        waiting: connections that it holds and never answers.
    """

    url: str = ""
    waiting: set[asyncio.Task] = field(default_factory=set)


@asynccontextmanager
async def host(address: str, content: bytes | None) -> AsyncIterator[Host]:
    """A web server at a loopback address that answers every request with ``content``; with None never."""
    here = Host()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if content is None:
                    here.waiting.add(task)
                    await reader.read()
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            here.waiting.discard(task)
            writer.close()

    server = await asyncio.start_server(answer, address, 0)
    here.url = f"http://{address}:{server.sockets[0].getsockname()[1]}"
    try:
        yield here
    finally:
        server.close()


def application(
    model: str, hosts: list[Host], *, timeout: float = 5.0, load_format: str = "auto"
) -> LocalApplication:
    """An application with one model that may fetch from ``hosts``.

    Args:
        timeout: seconds that a host has for an image.
        load_format: of the model.
    """
    ports = [80, *(int(each.url.rpartition(":")[2]) for each in hosts)]
    engine: dict[str, Any] = {
        "model": model,
        "max_model_len": 1024,
        "kv_cache_bytes": 64 << 20,
        "max_num_seqs": 32,
    }
    engine["load_format"] = load_format
    fetch = {"allow_private": ["127.0.0.0/8"], "allowed_ports": ports, "timeout": timeout}
    # Small caches, which are full soon: their growth is no leak.
    config = {
        "models": [{"name": "model", "engine": engine, "encoder": {"cache_bytes": 4 << 20}}],
        "ingress": {"references": {"max_items": 300}},
        "fetch": fetch,
    }
    return LocalApplication(AppConfig.model_validate(config))


def chat(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The body of a chat about some parts."""
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def image_part(url: str | None, uuid: str | None = None) -> dict[str, Any]:
    """A part with an image by its URL, or by its ``uuid``."""
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, "uuid": uuid}
