"""Requests as they go over the wire, and answers of servers that keep to no rule."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from engine.errors import MediaError, MediaForbidden, MediaTooLarge
from engine.media.address import redirect_target, request_target
from engine.media.fetch import ByteBudget, MediaFetcher
from engine.media.guard import FetchPolicy, check_url
from engine.media.source import MediaSource
from tests.engine.media.test_fetch import PRIVATE, Names

BODY = b"\x89PNG picture"


def answer(*headers, status=b"200 OK", body=BODY, length=None):
    lines = [b"HTTP/1.1 " + status, b"Connection: close", *headers]
    lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class RawSite:
    """A server that answers each target with the given bytes, a list of answers in turn.

    Attributes:
        answers: an answer of None closes the connection without a word.
        seen: the targets that were asked for.
    """

    def __init__(self):
        self.answers = {}
        self.seen = []

    async def handle(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        target = head.split(b" ")[1].decode("latin-1")
        self.seen.append(target)
        found = self.answers.get(target, answer())
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if found is not None:
            writer.write(found)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def raw_site(resolver=None, **policy):
    here = RawSite()
    server = await asyncio.start_server(here.handle, "127.0.0.1", 0)
    here.port = server.sockets[0].getsockname()[1]
    allowed = {"allow_private": ("127.0.0.0/8",), "allowed_ports": {here.port}, "timeout": 30}
    fetcher = MediaFetcher(FetchPolicy(**{**allowed, **policy}), resolver)

    async def get(target, host="127.0.0.1", budget=None):
        url = f"http://{host}:{here.port}{target}"
        return await fetcher.fetch(MediaSource(0, "url", url=url), budget)

    here.get = get
    try:
        yield here
    finally:
        await fetcher.close()
        server.close()
        await server.wait_closed()


TARGETS = [
    *(f"/a%{code}b.png" for code in ("2C", "40", "21", "27", "7E", "3D", "2F", "25", "2b", "5B", "3a")),
    "/%e4%bd%a0.png",
    "/a+b!$&'()*,;=:@~-._.png",
    "/a//b/./c/../d.png",
    "/x?Credential=K%2F20260917%2Fregion%2Fs3&Signature=a%2Fb%2Bc%3D",
    "/x?u=http%3A%2F%2Fe.org%2F%3Fq",
    "/x?u=http://e.org/?q",
    "/x?sig=%2b%2f",
    "/x?e=%7E&f=%21&g=%2C",
    "/x?",
    "/?",
    "/x?&&a=&=b",
    "/x?a=1;b=2",
    '/x?a=[1]&b={2}&c=|^`"<>',
]


@pytest.mark.parametrize("target", TARGETS)
async def test_what_is_asked_for_is_what_the_caller_wrote(target):
    async with raw_site() as here:
        assert await here.get(target) == BODY
        assert here.seen == [target]
        here.answers["/to"] = answer(b"Location: " + target.encode(), status=b"302 Found")
        assert await here.get("/to") == BODY
        # A relative reference loses its dots on the way, as RFC 3986 has it.
        assert here.seen[2:] == [target.replace("/./c/../", "/")]
        whole = f"http://127.0.0.1:{here.port}{target}".encode()
        here.answers["/to"] = answer(b"Location: " + whole, status=b"302 Found")
        assert await here.get("/to") == BODY
        assert here.seen[4:] == [target]


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("", "/"),
        ("?a=b", "/?a=b"),
        ("#part", "/"),
        ("/a#part?x", "/a"),
        ("/ü.png?q=你", "/%C3%BC.png?q=%E4%BD%A0"),
    ],
)
async def test_what_a_request_cannot_hold_is_encoded(written, asked):
    async with raw_site() as here:
        assert await here.get(written) == BODY
        assert here.seen == [asked]


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        (b"/a b.png?c d", "/a%20b.png?c%20d"),
        (b"  /ok  ", "/ok"),
        (b"/b\xe9.png", "/b%E9.png"),
        ("/bébé.png".encode(), "/b%C3%A9b%C3%A9.png"),
        (b"other.png", "/folder/other.png"),
        (b"./other.png", "/folder/other.png"),
        (b"../other.png", "/other.png"),
        (b"../../../other.png", "/other.png"),
        (b"?b=%2F", "/folder/to?b=%2F"),
        (b"/ok#part", "/ok"),
        (b"/a?b=../c", "/a?b=../c"),
    ],
)
async def test_redirects_lead_where_browsers_go(location, asked):
    async with raw_site() as here:
        here.answers["/folder/to?a=1"] = answer(b"Location: " + location, status=b"302 Found")
        assert await here.get("/folder/to?a=1") == BODY
        assert here.seen[1:] == [asked]


@pytest.mark.parametrize("location", [b"", b"/a\\b", b"\\\\10.0.0.1/", b"/a\tb", b"/\x7f", b"/\xc2\x85"])
async def test_redirects_that_parsers_read_differently_are_refused(location):
    async with raw_site() as here:
        here.answers["/to"] = answer(b"Location: " + location, status=b"302 Found")
        with pytest.raises(MediaForbidden, match="unusable"):
            await here.get("/to")
        assert here.seen == ["/to"]


@pytest.mark.parametrize(
    "location",
    [
        b"http://10.0.0.1 /",
        b"http://10.0.0.1%2f@127.0.0.1/",
        b"http:/10.0.0.1/",
        b"http://\xe9.org/",
        b"//10.0.0.1?a",
    ],
)
async def test_redirects_to_other_hosts_are_checked(location):
    async with raw_site() as here:
        here.answers["/to"] = answer(b"Location: " + location, status=b"302 Found")
        with pytest.raises(MediaForbidden):
            await here.get("/to")
        assert here.seen == ["/to"]


@pytest.mark.parametrize(
    "encoding", ["identity", "Identity", "", "none", "binary", "utf-8", "UTF-8", "base64"]
)
async def test_bytes_in_the_clear_are_taken_whatever_they_are_called(encoding):
    async with raw_site() as here:
        here.answers["/a"] = answer(b"Content-Encoding: " + encoding.encode())
        assert await here.get("/a") == BODY
        here.answers["/a"] = answer(b"Content-Encoding: aws-chunked, " + encoding.encode())
        assert await here.get("/a") == BODY


@pytest.mark.parametrize(
    "encoding", ["gzip", "GZIP", "br", "zstd", "deflate", "aws-chunked,gzip", "utf-8, br"]
)
async def test_compressed_bodies_are_refused(encoding):
    async with raw_site() as here:
        here.answers["/a"] = answer(b"Content-Encoding: " + encoding.encode())
        with pytest.raises(MediaError, match="compressed"):
            await here.get("/a")


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Security-Policy: " + b"a" * 20_000],
        [b"X-%d: 1" % number for number in range(300)],
        [b'Content-Disposition: inline; filename="b\xe9.png"'],
        [b"Set-Cookie: a=b", b"Set-Cookie: c=d"],
        [b"Content-Type: text/html"],
    ],
)
async def test_unusual_headers(headers):
    async with raw_site() as here:
        here.answers["/a"] = answer(*headers)
        assert await here.get("/a") == BODY


async def test_endless_headers_are_refused():
    async with raw_site() as here:
        for headers in ([b"X: " + b"a" * 200_000], [b"X-%d: 1" % number for number in range(5000)]):
            here.answers["/a"] = answer(*headers)
            with pytest.raises(MediaError, match=r"127\.0\.0\.1 failed: the answer is not valid HTTP\."):
                await here.get("/a")


@pytest.mark.parametrize("status", [b"203 Non-Authoritative Information", b"200 ", b"200 Tr\xc3\xa8s bien"])
async def test_answers_that_hold_an_image(status):
    async with raw_site() as here:
        here.answers["/a"] = answer(status=status)
        assert await here.get("/a") == BODY


#: Answers that may succeed the next time, and what the caller is told if they don't.
FAILURES = {
    "closed": (None, "failed: the connection ended before the answer"),
    "cut": (answer(length=len(BODY) + 5), "failed: the connection ended before the file did"),
    "502": (answer(status=b"502 Bad Gateway"), "status 502"),
    "503": (answer(status=b"503 Service Unavailable"), "status 503"),
    "504": (answer(status=b"504 Gateway Timeout"), "status 504"),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_is_tried_again_once(failure):
    failed, told = FAILURES[failure]
    async with raw_site() as here:
        here.answers["/a"] = [failed, answer()]
        # The bytes of the first attempt don't count.
        assert await here.get("/a", budget=ByteBudget(len(BODY))) == BODY
        assert here.seen == ["/a", "/a"]
        here.answers["/b"] = [failed]
        with pytest.raises(MediaError, match=told):
            await here.get("/b")
        assert here.seen[2:] == ["/b", "/b"]


async def test_an_attempt_is_left_for_all_redirects_together():
    to, failed = answer(b"Location: /b", status=b"302 Found"), FAILURES["502"][0]
    async with raw_site() as here:
        here.answers |= {"/a": [failed, to], "/b": [answer()]}
        assert await here.get("/a") == BODY
        here.answers |= {"/a": [failed, to], "/b": [failed, answer()]}
        with pytest.raises(MediaError):
            await here.get("/a")
        assert here.seen == ["/a", "/a", "/b", "/a", "/a", "/b"]


@pytest.mark.parametrize(
    "status", [b"404 Not Found", b"403 Forbidden", b"500 Oops", b"206 Partial", b"429 Slow"]
)
async def test_other_answers_are_final(status):
    async with raw_site() as here:
        here.answers["/a"] = answer(status=status)
        with pytest.raises(MediaError, match=f"status {status[:3].decode()}"):
            await here.get("/a")
        assert here.seen == ["/a"]


async def test_what_is_too_large_is_not_tried_again():
    async with raw_site(max_bytes=4) as here:
        with pytest.raises(MediaTooLarge):
            await here.get("/a")
        assert here.seen == ["/a"]


async def test_attempts_share_the_time():
    release = asyncio.Event()
    seen = []

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        seen.append(len(seen))
        if len(seen) == 1:
            writer.write(FAILURES["503"])
            writer.close()
        else:
            await release.wait()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    policy = FetchPolicy(allow_private=("127.0.0.0/8",), allowed_ports={port}, timeout=3)
    fetcher = MediaFetcher(policy)
    with pytest.raises(MediaError, match=r"did not deliver within 3 seconds"):
        await fetcher.fetch(MediaSource(0, "url", url=f"http://127.0.0.1:{port}/"))
    assert seen == [0, 1]
    release.set()
    await fetcher.close()
    server.close()


async def test_every_attempt_is_checked():
    """A name that turns private between two attempts is refused at the second, or not asked for again."""
    async with raw_site(Names(turns_example=[["127.0.0.1"], [PRIVATE]])) as here:
        here.answers["/a"] = [FAILURES["502"], answer()]
        try:
            assert await here.get("/a", host="turns.example") == BODY
        except MediaForbidden:
            assert here.seen == ["/a"]


def test_targets_and_redirects_in_text():
    assert request_target("HTTP://h:80/a%2Cb?c#d") == "/a%2Cb?c"
    assert request_target("http://h") == "/" and request_target("http://h?a/b") == "/?a/b"
    assert request_target("http://h/\udce9") == "/%E9"
    base = "http://h/a/b?c"
    assert redirect_target(base, "d") == "http://h/a/d"
    assert (
        redirect_target(base, "//i/d") == "http://i/d" or redirect_target(base, "//i/d") == "http:" + "//i/d"
    )
    assert redirect_target(base, "HTTPS://i/../d") == "HTTPS://i/../d"
    assert redirect_target(base, "/..") == "http://h/" and redirect_target(base, ".") == "http://h/a/"
    assert redirect_target("http://h", "d") == "http://h/d"


def test_the_host_dialled_is_the_host_checked():
    """Whatever the spelling: the request's host is the one that was compared with the policy."""
    policy = FetchPolicy(allowed_hosts=("a.org",))
    for text in (
        "http://a.org/@b.org",
        "http://A.ORG?@b.org/",
        "http://a.org#@b.org/",
        "http://a.org/http://b.org",
    ):
        url = check_url(text, policy, "url")
        assert url.raw_host == "a.org" and url.port == 80
        assert url.raw_path_qs == request_target(text)
