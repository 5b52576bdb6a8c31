"""Answers a file of requests without a server: ``python -m deployments.batch requests.jsonl answers.jsonl``.

Each line of the file is a request of OpenAI's Batch API, and each line of the other file its answer. A run
that was cut off goes on if it is started again: requests that were answered with 200 are left out. Others are
sent again, and have a further line for each run; the last one counts.
"""

import argparse
import asyncio
import fcntl
import json
import logging
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from starlette.types import ASGIApp, Message

from deployments.in_process import LocalApplication
from deployments.preflight import InTheWay, check_applications, read_config
from engine.errors import SightlineError

#: Statuses of requests that are sent again, how often at most, and the longest wait in seconds.
_AGAIN, _TRIES, _LONGEST_WAIT_S = (429, 503), 8, 30.0

#: How an answer begins.
_ID = "batch_req_"
_HEAD = json.dumps({"id": _ID}).encode().removesuffix(b'"}')

_log = logging.getLogger(__name__)

Json = dict[str, Any]
Outcome = Literal["answered", "refused", "skipped"]

_TOO_DEEP = "Lists and objects of this line are nested too deeply."


class BadLine(Exception):
    """A line that is no request; the message says why."""


@dataclass(frozen=True, slots=True)
class _Response:
    """What the application has sent."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class BatchFiles:
    """The requests that are left, and the file of their answers.

    Args:
        requests: JSON lines.
        answers: JSON lines of an earlier run, to which further ones are added. No other run may write to it.

    Raises:
        InTheWay: another run writes the answers, or they aren't a batch's; the file is as it was.
    """

    requests: BinaryIO
    answers: BinaryIO
    _answered: set[str] = field(default_factory=set)
    _seen: set[str] = field(default_factory=set)
    _number: int = 0

    def __post_init__(self) -> None:
        try:
            fcntl.flock(self.answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InTheWay(f"Another run writes to {self.answers.name}.") from None
        except OSError:
            # This file system has no locks.
            pass
        self.answers.seek(0)
        whole = 0
        for number, line in enumerate(self.answers, start=1):
            if not line.endswith(b"\n") and line[: len(_HEAD)] == _HEAD[: len(line)]:
                # The last run ended while it wrote this line.
                break
            whole += len(line)
            if not line.strip():
                continue
            try:
                name, status = _answer_of(line)
            except (KeyError, RecursionError, TypeError, ValueError):
                raise InTheWay(f"{self.answers.name}, line {number}, is no answer of a batch.") from None
            if name is not None and status == 200:
                self._answered.add(name)
        self.answers.truncate(whole)
        self.answers.seek(whole)

    def next_line(self) -> tuple[int, bytes] | None:
        """The next line that isn't empty, and its number from 1; None at the end."""
        for line in self.requests:
            self._number += 1
            if line.strip():
                return self._number, line
        return None

    def read(self, line: bytes) -> tuple[str, str, bytes] | None:
        """The id, the path and the body of a request, as JSON; None if it has been answered.

        Raises:
            BadLine: the line is no request.
        """
        try:
            given = json.loads(line)
        except ValueError:
            raise BadLine("This line is not valid JSON.") from None
        except RecursionError:
            raise BadLine(_TOO_DEEP) from None
        if not isinstance(given, dict):
            raise BadLine("This line is no object.")
        name, url, body = given.get("custom_id"), given.get("url"), given.get("body")
        if not isinstance(name, str) or not name:
            raise BadLine("custom_id must be a string that isn't empty.")
        if not _is_text(name):
            raise BadLine("custom_id has half of a surrogate pair, which is no character.")
        if name in self._seen:
            raise BadLine(f"custom_id {name[:100]!r} has come before.")
        self._seen.add(name)
        if given.get("method", "POST") != "POST":
            raise BadLine("method must be POST.")
        if not isinstance(url, str) or not url.startswith("/") or not _is_text(url):
            raise BadLine("url must be a path, such as /v1/chat/completions.")
        if not isinstance(body, dict):
            raise BadLine("body must be an object.")
        for name_of_field in ("stream", "background"):
            if body.get(name_of_field):
                raise BadLine(f"body.{name_of_field} must be false.")
        if name in self._answered:
            return None
        try:
            return name, url, json.dumps(body).encode()
        except RecursionError:
            raise BadLine(_TOO_DEEP) from None

    def write(self, answer: Json) -> None:
        """Add an answer, so that it survives this process."""
        # Half of a surrogate pair stays what it is in JSON: an escape.
        line = json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")
        self.answers.write(line + b"\n")
        self.answers.flush()


def _answer_of(line: bytes) -> tuple[str | None, int | None]:
    """The request's id and the response's status in a line that :meth:`BatchFiles.write` has made.

    Raises:
        KeyError, RecursionError, TypeError, ValueError: it has not.
    """
    made = json.loads(line)
    name, response = made["custom_id"], made["response"]
    if not isinstance(made["id"], str) or not made["id"].startswith(_ID) or not isinstance(name, str | None):
        raise ValueError
    return name, None if response is None else response["status_code"]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


async def answer_all(app: ASGIApp, files: BatchFiles, at_a_time: int) -> Counter[Outcome]:
    """Answer all requests that are left; return how many had which end.

    Answers are written as they are ready, in any order.

    Args:
        app: the application.
        at_a_time: the most requests that are open, and in memory.
    """
    counts: Counter[Outcome] = Counter()
    reading = asyncio.Lock()

    async def work() -> None:
        while True:
            async with reading:
                found = await asyncio.to_thread(files.next_line)
            if found is None:
                return
            counts[await _answer(app, files, *found)] += 1

    await asyncio.gather(*(work() for _ in range(at_a_time)))
    return counts


async def _answer(app: ASGIApp, files: BatchFiles, number: int, line: bytes) -> Outcome:
    answer: Json = {"id": f"{_ID}{uuid.uuid4().hex}", "custom_id": None, "response": None, "error": None}

    def refused(code: str, why: object) -> Outcome:
        answer["error"] = {"code": code, "message": f"Line {number}: {why}"}
        files.write(answer)
        return "refused"

    try:
        given = files.read(line)
    except BadLine as error:
        return refused("invalid_line", error)
    if given is None:
        return "skipped"
    answer["custom_id"], url, body = given
    try:
        response = await _post(app, url, body)
    except Exception:
        # One request stops no other.
        _log.exception("The request of line %d failed.", number)
        return refused("internal_error", "The request failed; the log has the details.")
    try:
        made = json.loads(response.body)
    except ValueError:
        why = f"The response, of the status {response.status}, is no JSON; ask for another format."
        return refused("invalid_response", why)
    answer["response"] = {
        "status_code": response.status,
        "request_id": response.headers.get("x-request-id", ""),
        "body": made,
    }
    files.write(answer)
    return "answered" if response.status == 200 else "refused"


async def _post(app: ASGIApp, url: str, body: bytes) -> _Response:
    """Send a request, again where the application asks for that."""
    for _ in range(_TRIES - 1):
        response = await _exchange(app, url, body)
        if response.status not in _AGAIN:
            return response
        await asyncio.sleep(min(float(response.headers.get("retry-after", 1.0)), _LONGEST_WAIT_S))
    return await _exchange(app, url, body)


async def _exchange(app: ASGIApp, url: str, body: bytes) -> _Response:
    path, _, query = url.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "client": ("127.0.0.1", 0),
        "server": ("batch", 80),
    }
    parts: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, headers, sent = 500, {}, bytearray()

    async def receive() -> Message:
        if (part := next(parts, None)) is not None:
            return part
        # The client stays to the end.
        return await asyncio.Future()

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            sent.extend(message.get("body", b""))

    await app(scope, receive, send)
    return _Response(status, headers, bytes(sent))


def main(arguments: list[str] | None = None) -> int:
    """Answer the file's requests. Return 0 if each has an answer, 1 if some were refused or nothing runs."""
    parser = argparse.ArgumentParser(prog="python -m deployments.batch", description=__doc__)
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument("--at-a-time", type=int, default=256, help="the most requests that are open (256)")
    options = parser.parse_args(arguments)
    try:
        counts = asyncio.run(_run(options.config, options.requests, options.answers, options.at_a_time))
    except (InTheWay, SightlineError, OSError) as error:
        print(f"batch: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{counts[end]} {end}" for end in ("answered", "refused", "skipped")), file=sys.stderr)
    return 1 if counts["refused"] else 0


async def _run(config: Path, requests: Path, answers: Path, at_a_time: int) -> Counter[Outcome]:
    args = next(iter(check_applications(read_config(config)).values()), None)
    if args is None:
        raise InTheWay(f"{config} has no application of deployments.app:build.")
    at_a_time = max(1, min(at_a_time, args.ingress.max_active_requests))
    # Who may read the files needs no key.
    ingress = args.ingress.model_copy(update={"keys": (), "page": False})
    with requests.open("rb") as given, answers.open("a+b") as made:
        files = BatchFiles(given, made)
        app = LocalApplication(args.model_copy(update={"ingress": ingress}))
        try:
            return await answer_all(app, files, at_a_time)
        finally:
            await app.close()


if __name__ == "__main__":
    sys.exit(main())
