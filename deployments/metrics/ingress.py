"""Metrics of the ingress: HTTP requests, and the answers of each model as clients see them."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.metrics.families import Counter, Family, Timer
from deployments.metrics.stage import DURATION_BUCKETS, OUTCOMES, outcome
from deployments.report import Report, current_report
from engine.metrics import TIME_BUCKETS, Histogram
from engine.outputs import StreamUpdate, Usage

#: When the current HTTP request arrived, by ``time.perf_counter``.
arrival: ContextVar[float | None] = ContextVar("arrival", default=None)


class HttpMeter:
    """Counts and times HTTP requests by endpoint."""

    def __init__(self) -> None:
        self._requests = Counter(
            "sightline_http_requests_total", "Requests by endpoint and status.", "route", "code"
        )
        self._duration = Timer(
            "sightline_http_request_duration_seconds",
            "Time from a request's arrival to the last byte of its response.",
            "route",
            bounds=DURATION_BUCKETS,
        )
        self._open: dict[int, Report] = {}
        self._received = self._sent = self._stalled = 0

    def around(self, app: ASGIApp, routes: list) -> ASGIApp:
        """``app``, measured. The labels are the paths of ``routes``, never a client's own text."""
        plain = {route.path for route in routes if isinstance(route, Route) and "{" not in route.path}
        with_names = [route for route in routes if isinstance(route, Route) and "{" in route.path]

        def label(path: str) -> str:
            if path in plain:
                return path
            return next((route.path for route in with_names if route.path_regex.match(path)), "other")

        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began = time.perf_counter()
            token = arrival.set(began)
            report = current_report()
            self._open[id(report)] = report

            async def counted() -> Message:
                message = await receive()
                self._received += len(message.get("body", b""))
                return message

            try:
                await app(scope, counted, send)
            finally:
                arrival.reset(token)
                del self._open[id(report)]
                self._sent += _sent_bytes(report)
                self._stalled += report.stalled
                # 499, as proxies log a client that has left before it was answered.
                code = str(report.status or 499)
                route = label(scope["path"].rstrip("/") or "/")
                self._duration.of(route).observe(time.perf_counter() - began)
                self._requests.add(route, code)

        return measured

    def families(self) -> list[Family]:
        of, sent = Family.of, self._sent + sum(map(_sent_bytes, self._open.values()))
        return [
            self._requests.family(),
            self._duration.family(),
            of("sightline_http_open_requests", "gauge", "Requests that are open.", len(self._open)),
            of("sightline_http_received_bytes_total", "counter", "Bytes of request bodies.", self._received),
            of("sightline_http_sent_bytes_total", "counter", "Bytes of response bodies.", sent),
            of(
                "sightline_http_stalled_total",
                "counter",
                "Responses that were ended because their clients did not read them.",
                self._stalled,
            ),
        ]


def _sent_bytes(report: Report) -> int:
    return 0 if report.response is None else report.response.num_bytes


#: The stages that an ingress calls.
STAGES = ("preprocessor", "encoder", "language_model")


class ModelMeter:
    """Counts and times the answers of one model, and the ingress's calls of its stages.

    Args:
        lost: the error which says that a stage's replica has died.
    """

    def __init__(self, lost: type[Exception]) -> None:
        self._lost_error = lost
        self._answers = Counter(
            "sightline_answers_total",
            "Answers and vectors by the way in which they ended.",
            "outcome",
            known=OUTCOMES,
        )
        self._duration = Histogram(DURATION_BUCKETS)
        self._first = Histogram(TIME_BUCKETS)
        self._between = Histogram(TIME_BUCKETS)
        self._open = 0
        self._tokens = Usage()
        self._calls = Timer(
            "sightline_stage_call_duration_seconds",
            "Time of the ingress's calls of a stage: waiting for a replica, transport and work.",
            "stage",
            bounds=DURATION_BUCKETS,
            known=STAGES,
        )
        self._open_calls = dict.fromkeys(STAGES, 0)
        self._lost = Counter(
            "sightline_stage_lost_total",
            "Calls of a stage whose replica died meanwhile.",
            "stage",
            known=STAGES,
        )
        self._failovers = Counter(
            "sightline_failovers_total",
            "Work that was started again after a replica had died.",
            "work",
            known=("prepare", "answer"),
        )

    def call(self, stage: str) -> AbstractContextManager[None]:
        """Count and time a call of a stage, while it is open and if its replica dies."""
        return _Call(self, stage)

    def calls(self, stage: str) -> None:
        """Count a call of a stage as open; :meth:`called` must follow."""
        self._open_calls[stage] += 1

    def called(self, stage: str, seconds: float, error: BaseException | None) -> None:
        """Count a call of a stage that has ended.

        Args:
            error: that the call raised; None if it raised none.
        """
        self._open_calls[stage] -= 1
        if isinstance(error, self._lost_error):
            self._lost.add(stage)
        self._calls.of(stage).observe(seconds)

    def failover(self, work: str) -> None:
        """Count work that is started again because a replica has died.

        Args:
            work: ``prepare``, of images and prompt, or ``answer``.
        """
        self._failovers.add(work)

    def answer(self) -> AbstractContextManager[None]:
        """Count and time an answer from the arrival of its HTTP request, as :data:`arrival` has it."""
        return _Answer(self)

    def stream(self, choices: int) -> AbstractContextManager[Callable[[StreamUpdate], None]]:
        """Count, time and report a streamed answer and its tokens.

        Args:
            choices: answers in parallel.

        Returns:
            A context that gives a function to be called with each update.
        """
        return _Stream(self, choices)

    def begun(self) -> None:
        """Count an answer as open; :meth:`ended` must follow."""
        self._open += 1

    def ended(self, seconds: float, error: BaseException | None) -> None:
        """Count an answer that has ended.

        Args:
            error: that ended it; None if it is whole.
        """
        self._open -= 1
        self._answers.add(outcome(error))
        self._duration.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time to an answer's first token."""
        self._first.observe(seconds)

    def further_tokens(self, seconds: float, count: int) -> None:
        """Count the mean time between ``count`` tokens."""
        self._between.observe(seconds, count)

    def count_tokens(self, usage: Usage) -> None:
        """Count the tokens of a request that has ended."""
        self._tokens += usage

    def families(self) -> list[Family]:
        of = Family.of
        return [
            self._answers.family(),
            of(
                "sightline_answer_duration_seconds",
                "histogram",
                "Time from a request's arrival to the end of its answer.",
                self._duration.snapshot(),
            ),
            of("sightline_open_answers", "gauge", "Answers that are being generated.", self._open),
            of(
                "sightline_time_to_first_token_seconds",
                "histogram",
                "Time from a request's arrival at the ingress to its first token.",
                self._first.snapshot(),
            ),
            of(
                "sightline_time_between_tokens_seconds",
                "histogram",
                "Time between two tokens of a choice at the ingress.",
                self._between.snapshot(),
            ),
            of(
                "sightline_prompt_tokens_total",
                "counter",
                "Tokens of the prompts of ended answers.",
                self._tokens.prompt_tokens,
            ),
            of(
                "sightline_completion_tokens_total",
                "counter",
                "Tokens of ended answers.",
                self._tokens.completion_tokens,
            ),
            of(
                "sightline_cached_tokens_total",
                "counter",
                "Tokens of the prompts of ended answers that came from the prefix cache.",
                self._tokens.cached_tokens,
            ),
            self._calls.family(),
            Family(
                "sightline_stage_open_calls",
                "gauge",
                "Calls of a stage by the ingress that have not ended.",
                [({"stage": stage}, count) for stage, count in self._open_calls.items()],
            ),
            self._lost.family(),
            self._failovers.family(),
        ]


# Contexts that are entered for each request are classes: a generator's take several times as long.


class _Call:
    __slots__ = ("_began", "_meter", "_stage")

    def __init__(self, meter: ModelMeter, stage: str) -> None:
        self._meter, self._stage = meter, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._meter.calls(self._stage)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._meter.called(self._stage, time.perf_counter() - self._began, error)


class _Answer:
    __slots__ = ("_began", "_meter")

    def __init__(self, meter: ModelMeter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._began = arrival.get() or time.perf_counter()
        self._meter.begun()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._meter.ended(time.perf_counter() - self._began, error)


class _Stream:
    """Counts, times and reports the updates of one answer."""

    __slots__ = ("_began", "_choices", "_last", "_meter", "_report", "_usage")

    def __init__(self, meter: ModelMeter, choices: int) -> None:
        self._meter, self._choices = meter, choices
        self._report = current_report()
        self._usage: Usage | None = None
        #: When a choice's last tokens came, by the choice's index.
        self._last: dict[int, float] = {}

    def __enter__(self) -> Callable[[StreamUpdate], None]:
        self._began = arrival.get() or time.perf_counter()
        self._meter.begun()
        return self._take

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._usage is not None:
            self._meter.count_tokens(self._usage)
            self._report.ended(self._usage, self._choices)
        self._meter.ended(time.perf_counter() - self._began, error)

    def _take(self, update: StreamUpdate) -> None:
        self._usage = update.usage
        if update.times is not None:
            self._report.first_token(update.times)
        now, last = time.perf_counter(), self._last
        for delta in update.deltas:
            count = len(delta.token_ids)
            if not count:
                continue
            if not last:
                self._meter.first_token(now - self._began)
            before = last.get(delta.index)
            if before is not None:
                self._meter.further_tokens((now - before) / count, count)
            last[delta.index] = now
