import asyncio
import base64
import gzip
import os
import socket
import threading
import tracemalloc
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from aiohttp.test_utils import TestServer

from engine.errors import MediaError, MediaForbidden, MediaTooLarge
from engine.media.fetch import MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource

BODY = b"\x89PNG" + bytes(3000)
PUBLIC, PRIVATE = "8.8.8.8", "10.0.0.1"


def source(url=None, **given):
    return MediaSource(0, "messages[0].content[0].image_url.url", url=url, **given)


class Names(AbstractResolver):
    """A name service that answers from a table, each answer in turn."""

    def __init__(self, **answers):
        self.answers = {host.replace("_", "."): list(given) for host, given in answers.items()}

    async def resolve(self, host, port=0, family=socket.AF_INET):
        answer = self.answers[host].pop(0) if len(self.answers[host]) > 1 else self.answers[host][0]
        return [
            {"hostname": host, "host": ip, "port": port, "family": family, "proto": 0, "flags": 0}
            for ip in answer
        ]

    async def close(self):
        pass


class Site:
    """A server on the loopback, and how many requests it has seen."""

    def __init__(self):
        self.seen = []
        self.connections = set()
        self.release = asyncio.Event()
        app = web.Application()
        app.router.add_get("/{name:.*}", self.answer)
        self.server = TestServer(app)

    async def answer(self, request):
        name = request.match_info["name"]
        self.seen.append(request)
        self.connections.add(request.transport.get_extra_info("peername"))
        if name.startswith("to/"):
            return web.Response(status=302, headers={"Location": request.query["url"]})
        if name == "loop":
            return web.Response(status=307, headers={"Location": "/loop"})
        if name == "nowhere":
            return web.Response(status=301)
        if name == "gzip":
            return web.Response(body=gzip.compress(BODY), headers={"Content-Encoding": "gzip"})
        if name in ("slow", "endless", "short"):
            return await self.stream(request, name)
        if name == "ok":
            return web.Response(body=BODY)
        return web.Response(status=404)

    async def stream(self, request, name):
        response = web.StreamResponse()
        if name == "short":
            response.content_length = 4000
        await response.prepare(request)
        await response.write(b"x")
        if name == "slow":
            await self.release.wait()
        while name == "endless":
            try:
                await response.write(bytes(1 << 16))
            except ConnectionError:
                break
        if name == "short":
            request.transport.close()
        return response


@asynccontextmanager
async def site(resolver=None, **policy):
    here = Site()
    await here.server.start_server()
    here.url = f"http://127.0.0.1:{here.server.port}"
    policy = {
        "allow_private": ("127.0.0.0/8",),
        "allowed_ports": {here.server.port},
        "timeout": 30,
        **policy,
    }
    fetcher = MediaFetcher(FetchPolicy(**policy), resolver)
    try:
        yield here, fetcher
    finally:
        here.release.set()
        await fetcher.close()
        await here.server.close()


async def test_images_are_fetched_over_connections_that_are_kept(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with site() as (here, fetcher):
        for _ in range(3):
            assert await fetcher.fetch(source(here.url + "/ok?q=%20a")) == BODY
        assert len(here.connections) == 1
        headers = here.seen[0].headers
        assert headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in headers
        assert here.seen[0].query["q"] == " a"


async def test_a_name_is_resolved_and_dialled_as_checked():
    async with site(Names(pictures_example=[["127.0.0.1"], [PRIVATE]])) as (here, fetcher):
        url = f"http://pictures.example:{here.server.port}/ok"
        assert await fetcher.fetch(source(url)) == BODY
        assert here.seen[0].headers["Host"] == f"pictures.example:{here.server.port}"


async def test_names_that_are_never_answered_hold_up_nothing_else(monkeypatch):
    """The system can't be told to stop asking; meanwhile other files are fetched and decoded."""
    answered, look_up = threading.Event(), socket.getaddrinfo

    def silent(host, *more):
        if host.startswith("silent"):
            answered.wait(60)
            raise socket.gaierror
        return look_up("127.0.0.1" if host == "pictures.example" else host, *more)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    large = "data:image/png;base64," + base64.b64encode(bytes(1 << 18)).decode()
    async with site() as (here, fetcher):
        port = here.server.port
        # More than the threads of an event loop.
        urls = [f"http://silent{number}.example:{port}/ok" for number in range(40)]
        waiting = [asyncio.ensure_future(fetcher.fetch(source(url))) for url in urls]
        try:
            async with asyncio.timeout(30):
                assert await fetcher.fetch(source(f"http://pictures.example:{port}/ok")) == BODY
                assert len(await fetcher.fetch(source(large))) == 1 << 18
            assert not any(fetch.done() for fetch in waiting)
        finally:
            answered.set()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert all("no address is known" in str(error) for error in errors)


async def test_names_are_not_looked_up_for_fetches_that_have_ended(monkeypatch):
    answered, look_up, asked = threading.Event(), socket.getaddrinfo, []

    def slow(host, *more):
        if host.endswith(".example"):
            asked.append(host)
        if host.startswith("silent"):
            answered.wait(60)
            raise socket.gaierror
        return look_up("127.0.0.1" if host == "pictures.example" else host, *more)

    limits = dict.fromkeys(("timeout", "video_timeout", "document_timeout"), 0.1)
    async with site(max_connections=1, **limits) as (here, fetcher):
        monkeypatch.setattr(socket, "getaddrinfo", slow)
        port, before = here.server.port, asyncio.all_tasks()
        try:
            for number in range(3):
                with pytest.raises(MediaError):
                    await fetcher.fetch(source(f"http://silent{number}.example:{port}/ok"))
            # The one thread still waits for the first name. aiohttp's tasks that wait for the thread end.
            left = asyncio.all_tasks() - before
            assert not left or not (await asyncio.wait(left, timeout=10))[1]
        finally:
            answered.set()
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await fetcher.fetch(source(f"http://pictures.example:{port}/ok")) == BODY
                    break
                except MediaError:  # this machine may be slower than the limit
                    continue
    assert asked[1] == "pictures.example"


@pytest.mark.parametrize("addresses", [[PRIVATE], [PUBLIC, PRIVATE], ["::ffff:10.0.0.1"], ["fe80::1"]])
async def test_a_name_with_any_private_address_is_refused(addresses):
    async with site(Names(evil_example=[addresses])) as (here, fetcher):
        with pytest.raises(MediaForbidden, match=r"evil\.example") as caught:
            await fetcher.fetch(source(f"http://evil.example:{here.server.port}/ok"))
        assert caught.value.param == source().where


async def test_redirects_are_followed_and_counted():
    async with site() as (here, fetcher):
        assert await fetcher.fetch(source(here.url + "/to/a?url=/to/b%3Furl=/ok")) == BODY
        assert await fetcher.fetch(source(f"{here.url}/to/a?url={here.url}/ok")) == BODY
        with pytest.raises(MediaError, match="more than 3 times"):
            await fetcher.fetch(source(here.url + "/loop"))


@pytest.mark.parametrize(
    "target",
    [
        "http://10.0.0.1/",
        "http://169.254.169.254/latest",
        "//10.0.0.1/x",
        "http://[::1]/",
        "http://user@8.8.8.8/",
        "http://8.8.8.8:22/",
        "file:///etc/passwd",
        "data:,x",
        "ftp://8.8.8.8/",
        "http://ok%5C%5C@127.0.0.1/".replace("%5C%5C", "%5C"),
        "http://2130706433/",
    ],
)
async def test_redirects_lead_nowhere_forbidden(target):
    async with site() as (here, fetcher):
        with pytest.raises(MediaForbidden):
            await fetcher.fetch(source(f"{here.url}/to/x?url={target}"))
        assert len(here.seen) == 1


@pytest.mark.parametrize(
    "policy", [{}, {"allow_private": ()}, {"allowed_ports": {80}}, {"allowed_hosts": ("a",)}]
)
async def test_the_default_reaches_no_loopback(policy):
    async with site(**({"allow_private": (), "allowed_ports": {80}} | policy)) as (here, fetcher):
        with pytest.raises(MediaForbidden):
            await fetcher.fetch(source(here.url + "/ok"))
        assert not here.seen


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("/missing", MediaError, r"127\.0\.0\.1 answered with status 404"),
        ("/nowhere", MediaForbidden, "unusable"),
        ("/gzip", MediaError, "compressed"),
        ("/endless", MediaTooLarge, "5000 bytes"),
        ("/short", MediaError, r"127\.0\.0\.1 failed"),
    ],
)
async def test_answers_that_are_not_taken(path, error, text):
    async with site(max_bytes=5000) as (here, fetcher):
        with pytest.raises(error, match=text) as caught:
            await fetcher.fetch(source(here.url + path + "?token=secret"))
        assert caught.value.param == source().where
        assert caught.value.status in (400, 413)
        assert "secret" not in str(caught.value)
        assert await fetcher.fetch(source(here.url + "/ok")) == BODY


async def test_an_announced_size_is_refused_unread():
    async with site(max_bytes=len(BODY) - 1) as (here, fetcher):
        with pytest.raises(MediaTooLarge):
            await fetcher.fetch(source(here.url + "/ok"))


async def test_a_body_that_never_ends_is_a_client_error_in_time():
    async with site(timeout=0.05) as (here, fetcher):
        with pytest.raises(MediaError, match=r"127\.0\.0\.1 did not deliver within 0\.05 seconds") as caught:
            await fetcher.fetch(source(here.url + "/slow?token=secret"))
        assert caught.value.status == 400


async def test_hosts_that_are_not_there():
    async with site(Names()) as (here, fetcher):
        with pytest.raises(MediaError):
            await fetcher.fetch(source(f"http://127.0.0.2:{here.server.port}/ok"))


async def test_all_images_of_a_request_share_a_budget():
    async with site(max_total_bytes=2 * len(BODY)) as (here, fetcher):
        url = here.url + "/ok"
        video = source(frames=(source(url), source(data=BODY)))
        assert await fetcher.fetch_all([video]) == [[BODY, BODY]]
        assert await fetcher.fetch_all([source(url), source(data=b"")]) == [[BODY], [b""]]
        with pytest.raises(MediaTooLarge, match="together"):
            await fetcher.fetch_all([source(url), source(url), source(data=b"x")])


async def test_the_first_failure_ends_the_other_fetches():
    async with site() as (here, fetcher):
        with pytest.raises(MediaError, match="404"):
            await fetcher.fetch_all([source(here.url + "/slow"), source(here.url + "/missing")])


def data_url(payload, head="data:image/png;base64"):
    return f"{head},{payload}"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 400_000])
async def test_data_urls(size):
    fetcher = MediaFetcher(FetchPolicy())
    data = os.urandom(size)
    encoded = base64.b64encode(data).decode()
    heads = (
        "data:image/png;base64",
        "DATA:;BASE64",
        "data:image/png;name=a;base64",
        "data:image/png;  base64 ",
    )
    for head in heads:
        assert await fetcher.fetch(source(data_url(encoded, head))) == data
    assert await fetcher.fetch(source(data=data)) == data


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
async def test_base64_as_browsers_read_it(size):
    """In lines, as programs write it; without padding; with percent signs."""
    data = os.urandom(size)
    lines, plain = base64.encodebytes(data).decode(), base64.b64encode(data).decode()
    for payload in (lines, lines.replace("\n", " \r\n\t\f"), plain.rstrip("="), quote(plain), quote(lines)):
        assert await MediaFetcher(FetchPolicy()).fetch(source(data_url(payload))) == data
    escaped = "".join(f"%{ord(character):02x}" for character in lines)
    assert await MediaFetcher(FetchPolicy()).fetch(source(data_url(escaped))) == data


async def test_percent_signs_take_little_memory():
    """A few bytes each, where the standard library's function takes some 200."""
    url = data_url("%" * 500_000)
    tracemalloc.start()
    try:
        with pytest.raises(MediaError):
            await MediaFetcher(FetchPolicy()).fetch(source(url))
        assert tracemalloc.get_traced_memory()[1] < 15 * len(url)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:;base64,A",
        "data:;base64,é",
        "data:;base64,AA-_",
        "data:;base64,AA=",
        "data:;base64,A===",
        "data:;base64,=AAA",
        "data:;base64,AA%00",
        "data:;base64,AA%%341",
        "data:;base64,AA%4",
        "data:;base64,AA%",
        "data:;base64,%",
        "data:base64,AAAA",
    ],
)
async def test_data_urls_that_are_not_base64(url):
    with pytest.raises(MediaError) as caught:
        await MediaFetcher(FetchPolicy()).fetch(source(url))
    assert caught.value.param == source().where


async def test_the_size_of_data_urls_is_checked_before_they_are_decoded(monkeypatch):
    fetcher = MediaFetcher(FetchPolicy(max_bytes=300))
    assert await fetcher.fetch(source(data_url("A" * 400))) == bytes(300)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MediaTooLarge):
        await fetcher.fetch(source(data_url("A" * 404)))
    with pytest.raises(MediaTooLarge):
        await fetcher.fetch(source(data=bytes(301)))


@pytest.fixture
def folder(tmp_path):
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    (allowed / "sub" / "ä b.png").write_bytes(BODY)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "a.png").write_bytes(b"secret")
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    (allowed / "inner.png").symlink_to(allowed / "sub" / "ä b.png")
    os.mkfifo(allowed / "pipe")
    return allowed


async def test_files_below_the_allowed_folder(folder):
    fetcher = MediaFetcher(FetchPolicy(allowed_local_media_path=str(folder)))
    for url in (f"file://{folder}/sub/%C3%A4%20b.png", f"FILE://localhost{folder}/sub/../sub/ä b.png"):
        assert await fetcher.fetch(source(url)) == BODY
    assert fetcher.fetch_blocking(source(f"file://{folder}/inner.png")) == BODY
    small = MediaFetcher(FetchPolicy(allowed_local_media_path=folder, max_bytes=10))
    with pytest.raises(MediaTooLarge):
        await small.fetch(source(f"file://{folder}/inner.png"))


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.png",
        "/sub/../../secret.png",
        "/%2e%2e/secret.png",
        "/link.png",
        "/../allowed-not/a.png",
        "/../missing.png",
        "/a%00.png",
    ],
)
async def test_files_outside_of_the_allowed_folder(folder, path):
    fetcher = MediaFetcher(FetchPolicy(allowed_local_media_path=folder))
    with pytest.raises(MediaForbidden, match="outside"):
        await fetcher.fetch(source(f"file://{folder}{path}"))


async def test_urls_that_name_no_file(folder):
    fetcher = MediaFetcher(FetchPolicy(allowed_local_media_path=folder))
    for path in ("/missing.png", "/sub", "/pipe"):
        with pytest.raises(MediaError) as caught:
            await fetcher.fetch(source(f"file://{folder}{path}"))
        assert str(folder) not in caught.value.message
    for url in (f"file://elsewhere{folder}/inner.png", "file://", "file:///etc/passwd"):
        with pytest.raises(MediaForbidden):
            await fetcher.fetch(source(url))
    with pytest.raises(MediaForbidden, match="reads no files"):
        await MediaFetcher(FetchPolicy()).fetch(source(f"file://{folder}/inner.png"))


async def test_fetching_from_a_thread():
    async with site() as (here, fetcher):
        found = [await asyncio.to_thread(fetcher.fetch_blocking, source(here.url + "/ok")) for _ in range(2)]
        assert found == [BODY, BODY]
        assert len(here.connections) == 1
        with pytest.raises(MediaError, match="404"):
            await asyncio.to_thread(fetcher.fetch_blocking, source(here.url + "/missing"))
        await asyncio.to_thread(fetcher.close_blocking)
    assert "media-fetch" not in {thread.name for thread in threading.enumerate()}
