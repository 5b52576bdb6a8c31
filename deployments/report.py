"""Facts about one HTTP request and the times of its stages: for its line in the log, and for ``usage``."""

import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope, Send

from deployments.leaving import ClientStalled, sent_within
from engine.errors import SightlineError
from engine.outputs import EngineTimes, Usage
from engine.prompt import MediaItem

#: Longer ids of clients are replaced: every line of the log would repeat them.
_MAX_ID = 128


@dataclass(slots=True)
class ItemReport:
    """One image or video of a request.

    Attributes:
        item: its description.
        cached: its embedding rows were in the encoder's cache.
        seconds: duration of each stage, by the stage's name: ``fetch``, ``prepare``, ``encode``.
        frames: frames of a video that the model was shown; 1 for an image.
        note: what is missing of it, in words; empty if nothing is.
    """

    item: MediaItem
    cached: bool
    seconds: Mapping[str, float]
    frames: int = 1
    note: str = ""


class SentResponse:
    """Sends a response to the client, and counts it. A :data:`~starlette.types.Send` itself.

    Every other part of the application stands between the endpoint and this. Those parts look at the start of
    a response and not at its body, so a response of many small pieces, most of which hold one token, may be
    begun by way of all parts and go on by :meth:`body`.

    Args:
        send: the server's.
        headers: further headers, encoded.
        pieces: sends pieces of the body that are not the last; ``send`` if None.
        abort: breaks the connection off; None if that can't be done from here.
        bodiless: leave the body out: the request is a HEAD.

    Attributes:
        status: None until the response begins.
        num_bytes: of the body.
        complete: the whole response was sent.
        patience_s: seconds for which nothing may be sent because the client does not read; None: for ever.
        stalled: the response was ended because the client did not read it.
    """

    __slots__ = (
        "_abort",
        "_bodiless",
        "_headers",
        "_pieces",
        "_send",
        "complete",
        "num_bytes",
        "patience_s",
        "stalled",
        "status",
    )

    def __init__(
        self,
        send: Send,
        headers: Sequence[tuple[bytes, bytes]],
        pieces: Send | None = None,
        abort: Callable[[], None] | None = None,
        *,
        bodiless: bool = False,
    ) -> None:
        self._send, self._headers, self._bodiless = send, headers, bodiless
        self._pieces, self._abort = pieces or send, abort
        self.status: int | None = None
        self.num_bytes = 0
        self.complete = self.stalled = False
        self.patience_s: float | None = None

    async def __call__(self, message: Message) -> None:
        """Send a message.

        Raises:
            ClientDisconnect: the client didn't read for too long.
        """
        try:
            await sent_within(self.patience_s, self._whole(message))
        except ClientStalled:
            self.give_up()
            raise ClientDisconnect from None

    def give_up(self) -> None:
        """End the response of a client that doesn't read, and the connection, which would wait for it."""
        self.stalled = True
        if self._abort is not None:
            self._abort()

    async def _whole(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.body(message.get("body", b""), message.get("more_body", False))
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)

    def body(self, data: bytes, more: bool = True) -> Awaitable[None]:
        """Send a piece of the body; the last one if there is not ``more``."""
        if self._bodiless:
            data = b""
        self.num_bytes += len(data)
        message = {"type": "http.response.body", "body": data, "more_body": more}
        return self._pieces(message) if more else self._end(message)

    async def _end(self, message: Message) -> None:
        await self._send(message)
        self.complete = True


@dataclass(slots=True)
class Report:
    """The facts known about one request.

    A request may hold several prompts that are served concurrently. Their token counts are added, and each
    stage counts with its longest time.

    Attributes:
        id: the client's ``x-request-id``, or one made here.
        began: ``time.perf_counter()`` when the request arrived.
        key: name of the caller's API key.
        model, answer: name of the model, and the id in the answer.
        error: the error that the client was sent, or one sent within a stream.
        media: images and videos in the order of the request.
        seconds: duration of each stage, by name.
        usage: token counts.
        choices: answers in parallel, over all prompts.
        response: what the client has been sent of the response; None outside of HTTP requests.
    """

    id: str = ""
    began: float = field(default_factory=time.perf_counter)
    key: str = ""
    model: str = ""
    answer: str = ""
    error: SightlineError | None = None
    media: list[ItemReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    choices: int = 0
    response: SentResponse | None = None
    _first_token_at: float | None = None
    _last_update_at: float | None = None

    @property
    def status(self) -> int | None:
        """The response's status; None until it begins."""
        return None if self.response is None else self.response.status

    @property
    def stalled(self) -> bool:
        """True if the response was ended because the client did not read it."""
        return self.response is not None and self.response.stalled

    def took(self, stage: str, seconds: float) -> None:
        """Note the duration of a stage."""
        self.seconds[stage] = max(seconds, self.seconds.get(stage, 0.0))

    def prepared(self, media: Sequence[ItemReport]) -> None:
        """Note the media of a prompt that is ready for the engine."""
        self.media += media
        for item in media:
            for stage, seconds in item.seconds.items():
                self.took(stage, seconds)

    def encoded(self, content_hash: str, cached: bool, seconds: float) -> None:
        """Note that a medium was encoded after the prompt was ready for the engine."""
        self.took("encode", seconds)
        for item in self.media:
            if item.item.hash == content_hash:
                item.cached, item.seconds = cached, {**item.seconds, "encode": seconds}

    def first_token(self, times: EngineTimes) -> None:
        """Note that the first token of an answer has arrived."""
        self._first_token_at = self._first_token_at or time.perf_counter()
        self.took("queue", times.queue_s)
        self.took("prefill", times.prefill_s)

    def ended(self, usage: Usage, choices: int = 1) -> None:
        """Note the last update of an answer, or of what a client has read of it."""
        self._last_update_at = time.perf_counter()
        self.choices += choices
        self.usage += usage

    def times(self) -> dict[str, float]:
        """Durations in milliseconds by name, in the order of the stages; those that are known.

        ``first_token`` and ``total`` count from the request's arrival, ``per_token`` is the mean time between
        the tokens of one choice.
        """
        now = time.perf_counter()
        found = {name: self.seconds[name] for name in STAGES if name in self.seconds}
        if self._first_token_at is not None:
            found["first_token"] = self._first_token_at - self.began
            gaps = self.usage.completion_tokens / max(self.choices, 1) - 1
            if gaps > 0 and self._last_update_at is not None:
                found["per_token"] = (self._last_update_at - self._first_token_at) / gaps
        found["total"] = now - self.began
        return {name: round(seconds * 1e3, 2) for name, seconds in found.items()}


#: Stages in order. ``prompt`` renders and tokenizes, ``queue`` waits for the engine, ``prefill`` computes the
#: prompt up to the first token.
STAGES = ("fetch", "prepare", "prompt", "encode", "queue", "prefill")

_current: ContextVar[Report | None] = ContextVar("report", default=None)


def current_report() -> Report:
    """The report of the request that the current task works on; outside of requests one that nobody reads."""
    return _current.get() or Report()


def begin_report(scope: Scope, new_id: Callable[[], str]) -> Report:
    """The report of a request that has just arrived; :func:`current_report` gives it from now on.

    Args:
        new_id: makes a unique id.
    """
    report = Report(_client_id(scope) or new_id())
    _current.set(report)
    return report


def _client_id(scope: Scope) -> str:
    """The client's id of a request if it is short and printable; empty if there is none."""
    for name, value in scope.get("headers", ()):
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if given.isascii() and given.isprintable() and " " not in given and 0 < len(given) <= _MAX_ID:
                return given
    return ""


class NewIds:
    """Makes unique ids that need not be secret.

    :mod:`secrets` asks the kernel for each, and meanwhile lets other threads run: then the event loop waits
    until they give way.
    """

    def __init__(self) -> None:
        self._random = random.Random(secrets.randbits(256))

    def __call__(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._random.getrandbits(128):032x}"
