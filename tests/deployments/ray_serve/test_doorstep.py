"""What stands before Ray Serve in an ingress's server; ``test_ends.py`` has it with Ray Serve and HAProxy."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.leaving import PIECES
from deployments.ray_serve.doorstep import Doorstep, middlewares
from deployments.ray_serve.ingress import Disconnects
from deployments.report import NewIds, SentResponse, current_report
from deployments.request_log import RequestLog
from deployments.sse import Closing, EventResponse, error_event
from tests.serving import wait_until


@pytest.fixture(autouse=True)
def nowhere(monkeypatch) -> None:
    """No application, before a test and behind it."""
    monkeypatch.setattr(Doorstep, "loop", None)


def before(app: ASGIApp) -> Doorstep:
    """The doorstep of an application that runs in this loop."""
    Doorstep.loop = asyncio.get_running_loop()
    return Doorstep(app)


class Serve:
    """Stands for Ray Serve between the doorstep and an application.

    Attributes:
        headers: of the last request.
        sent: types of what the application has sent by way of this.
        cancelled: the last request has ended so.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.headers: dict[bytes, bytes] = {}
        self.sent: list[str] = []
        self.cancelled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = dict(scope["headers"])

        async def noted(message) -> None:
            self.sent.append(message["type"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            self.cancelled = True


def logged(app: ASGIApp) -> ASGIApp:
    """``app`` within the log, which is outside of all else and sends what comes past it."""
    return RequestLog(False, NewIds()).around(app)


async def ask(
    app: ASGIApp, receive: Receive, *headers: tuple[bytes, bytes], method: str = "POST"
) -> tuple[Serve, list]:
    """Ask for something that the client waits for or leaves, as ``receive`` says; what was sent, and how."""
    sent: list = []

    async def send(message) -> None:
        sent.append(message)

    between = Serve(logged(Disconnects(app)))
    scope = {"type": "http", "method": method, "path": "/", "headers": list(headers)}
    task = asyncio.ensure_future(before(between)(scope, receive, send))
    await asyncio.wait_for(task, 60)
    assert not task.cancelling()
    return between, sent


async def streams(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that sends three pieces, as events are sent."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    response = current_report().response
    for piece in (b"1", b"2"):
        await response.body(piece)
    await send({"type": "http.response.body", "body": b"3"})
    # What a server says then is no client that leaves.
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def waits(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["method"] == "POST":
        await receive()
    await asyncio.Future()


class Streams:
    """An application that streams events, and takes its time to clean up behind the last.

    Attributes:
        cleaned: it has.
    """

    cleaned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def events():
            try:
                yield Closing(b"1")
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                self.cleaned = True

        await receive()
        await EventResponse(events(), lambda _: b"")(scope, receive, send)


async def test_a_server_s_word_at_the_end_is_no_client_that_leaves():
    """uvicorn says the same once all is sent."""
    app, complete, messages = Streams(), asyncio.Event(), [{"type": "http.request"}]

    async def receive():
        if not messages:
            await complete.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            complete.set()

    between = Serve(logged(Disconnects(app)))
    await before(between)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
    assert app.cleaned and not between.cancelled


async def streams_without_end(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads no body."""

    async def events():
        yield b"1"
        await asyncio.Future()

    await EventResponse(events(), lambda _: b"")(scope, receive, send)


def saying(*messages: str) -> Receive:
    """Gives messages of these types, and the last one for ever."""
    left = list(messages)

    async def receive():
        return {"type": left.pop(0) if len(left) > 1 else left[0]}

    return receive


async def test_pieces_go_past_ray_serve():
    between, sent = await ask(streams, saying("http.request", "http.disconnect"))
    assert b"".join(message.get("body", b"") for message in sent) == b"123"
    # It must know of a response's begin and end.
    assert between.sent == ["http.response.start", "http.response.body"] and not between.cancelled


@pytest.mark.parametrize("app", [waits, streams_without_end])
async def test_clients_of_requests_without_a_body_leave_too(app):
    between, _ = await ask(app, saying("http.request", "http.disconnect"), method="GET")
    assert between.cancelled


@pytest.mark.parametrize("given", [[], [(b"x-request-disconnect-disabled", b"?0")]], ids=["none", "own"])
async def test_work_for_a_client_that_leaves_ends_as_if_ray_serve_had_cancelled_it(given):
    between, sent = await ask(waits, saying("http.request", "http.disconnect"), *given)
    assert between.cancelled and not sent
    assert between.headers[b"x-request-disconnect-disabled"] == b"?1"


async def test_ingresses_alone_have_a_doorstep():
    assert middlewares() == []
    before(waits)
    assert [each.cls for each in middlewares()] == [Doorstep]


#: More than the buffers of a connection take.
MANY = 4000


async def sends_much(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends pieces of many sizes, empty ones among them."""
    pieces = scope.get(PIECES)
    response = SentResponse(send, (), pieces, bodiless=scope["method"] == "HEAD")
    headers = [(b"content-length", b"%d" % (3 * MANY))] if scope["path"] == "/known" else []
    await response({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(MANY):
        size = 3 if headers else number % 100
        rest = response.body(bytes([65 + number % 26]) * size)
        scope["app"].append(size and asyncio.iscoroutine(rest))
        await rest
    await response.body(b"" if headers else b"end", more=False)


async def answers(app: ASGIApp, method: str, path: str, version: str) -> tuple[bytes, bool]:
    """What uvicorn sends with ``app`` to a client that reads slowly, without the date; whether some piece has
    gone through uvicorn, so that it may have waited for the client."""
    waited: list[bool] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "app": waited}, receive, send)

    config = uvicorn.Config(noting, loop="none", lifespan="off", http="httptools", log_level="warning")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
        reader, writer = await asyncio.open_connection(sock=client, limit=1 << 12)
        writer.write(f"{method} {path} HTTP/{version}\r\nhost: test\r\nconnection: close\r\n\r\n".encode())
        sent = b"".join([part async for part in iterated(reader)])
        writer.close()
    finally:
        server.should_exit = True
        await serving
    return re.sub(rb"\r\ndate: [^\r]*", b"", sent), any(waited)


async def streams_much(scope: Scope, receive: Receive, send: Send) -> None:
    async def events():
        while True:
            yield b"data: " + b"x" * 60_000 + b"\n\n"

    response = current_report().response
    assert response is not None
    response.patience_s = 0.05
    await EventResponse(events(), error_event)(scope, receive, send)


async def answers_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    """What the client doesn't read before it asks for more is no stream."""
    response = current_report().response
    assert response is not None
    response.patience_s = 0.05
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 8_000_000})


@pytest.mark.parametrize("app", [streams_much, answers_at_length])
async def test_the_connection_of_a_client_that_does_not_read_is_broken_off(app):
    """To close it would take until the client has read what is to be sent."""
    ended = 0

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal ended
        try:
            await app(scope, receive, send)
        except ClientDisconnect:
            ended += 1

    served = before(Disconnects(logged(counted)))
    server = uvicorn.Server(
        uvicorn.Config(served, loop="none", lifespan="off", http="httptools", log_level="critical")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n" * 2)
            await wait_until(lambda: ended and not server.server_state.connections, 60)
            assert ended == 1
    finally:
        server.should_exit = True
        await serving


async def iterated(reader: asyncio.StreamReader):
    while part := await reader.read(1 << 12):
        yield part
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("method", "path", "version"),
    [("GET", "/", "1.1"), ("GET", "/", "1.0"), ("HEAD", "/", "1.1"), ("GET", "/known", "1.1")],
)
async def test_the_bytes_of_a_response_are_uvicorn_s(method, path, version):
    found, waited = await answers(before(Disconnects(sends_much)), method, path, version)
    assert found == (await answers(sends_much, method, path, version))[0]
    assert waited
    if path == "/":
        assert found.endswith(b"end\r\n0\r\n\r\n") == (method == "GET")


@pytest.fixture
def elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class ServeElsewhere:
    """Stands for Ray Serve by default: the application runs in another loop, and what it sends comes to the
    server's by a queue."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self._app, self._loop = app, loop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert not any(name == b"x-request-disconnect-disabled" for name, _ in scope["headers"])
        here, queue = asyncio.get_running_loop(), asyncio.Queue()

        async def put(message) -> None:
            here.call_soon_threadsafe(queue.put_nowait, message)

        async def run() -> None:
            try:
                await self._app(scope, receive, put)
            finally:
                await put(None)

        running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        while (message := await queue.get()) is not None:
            await send(message)
        await asyncio.wrap_future(running)


async def test_an_application_of_another_loop_answers_by_way_of_ray_serve(monkeypatch, elsewhere):
    monkeypatch.setattr(Doorstep, "loop", elsewhere)
    app = Doorstep(ServeElsewhere(Disconnects(sends_much), elsewhere))
    found, _ = await answers(app, "GET", "/", "1.1")
    assert found == (await answers(sends_much, "GET", "/", "1.1"))[0]
