"""Clients that are refused come back in turn: answers lose no time to refusals.

The event loop's clock moves on as work is done, and jumps where there is none, so that nothing depends on the
machine's speed.
"""

import asyncio
import selectors
from typing import Any

import pytest

from deployments.admission import MOST_TURNS, AdmissionLimit, is_work
from deployments.turns import Turns

#: Places of the ingress, and seconds that an answer takes the stages.
LIMIT, STAGES_S = 256, 2.0
#: Seconds of the load. Before the first of them all clients have come at once.
FIRST_S, LOAD_S = 6.0, 22.0
#: Seconds that the ingress itself works on an answer and on a refusal, about as measured.
ANSWER_S, REFUSAL_S = 0.004, 0.001


class Selector(selectors.SelectSelector):
    """Waits no real time; adds it to ``now`` instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += timeout or 0
        return super().select(0)


class Ingress:
    """Answers requests behind a limit; all of its work is done on one event loop."""

    def __init__(self) -> None:
        self.clock = Selector()
        self.answered = self.refused = 0
        self._app = AdmissionLimit(LIMIT).around(self._answer)

    async def _answer(self, *_: Any) -> None:
        self.clock.now += ANSWER_S
        await asyncio.sleep(STAGES_S)
        self.answered += FIRST_S <= self.clock.now < LOAD_S

    async def ask(self) -> int:
        """Send a request; 0 if it is answered, otherwise the seconds after which to come back."""
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app({"type": "http", "method": "POST", "path": "/", "headers": []}, None, send)  # type: ignore[arg-type]
        if not sent:
            return 0
        self.clock.now += REFUSAL_S
        self.refused += 1
        return int(dict(sent[0]["headers"])[b"retry-after"])

    def serve(self, clients: int, *, once: bool = False) -> None:
        """Have this many clients ask: until the load ends, or each until it is answered ``once``."""

        async def client() -> None:
            while once or self.clock.now < LOAD_S:
                wait = await self.ask()
                await asyncio.sleep(wait)
                if once and not wait:
                    return

        async def all_clients() -> None:
            await asyncio.gather(*(client() for _ in range(clients)))

        loop = asyncio.SelectorEventLoop(self.clock)
        loop.time = lambda: self.clock.now  # type: ignore[method-assign]
        try:
            loop.run_until_complete(all_clients())
        finally:
            loop.close()


def goodput(level: int) -> float:
    """Requests answered in a second if ``level`` times as many clients ask as there are places."""
    ingress = Ingress()
    ingress.serve(level * LIMIT)
    return ingress.answered / (LOAD_S - FIRST_S)


def test_ten_times_too_many_clients_take_no_answers_from_each_other():
    peak, *more = (goodput(level) for level in (1, 2, 10))
    assert min(more) >= 0.9 * peak


def test_it_is_the_turns_that_keep_the_goodput(monkeypatch):
    """All clients come back a second later: half of the time goes into refusals."""
    monkeypatch.setattr(Turns, "book", lambda *_: 1)
    assert goodput(10) < 0.7 * goodput(1)


def test_a_burst_is_answered_about_as_soon_as_possible():
    ingress = Ingress()
    ingress.serve(10 * LIMIT, once=True)
    assert ingress.clock.now < 1.5 * 10 * STAGES_S
    # Each is refused but a few times.
    assert ingress.refused < 2 * 10 * LIMIT


@pytest.mark.parametrize("ended_per_s", [0, 1, 1000])
def test_turns_are_at_the_rate_of_ends_within_bounds(ended_per_s):
    turns = Turns()
    for number in range(20 * ended_per_s):
        turns.ended(number / ended_per_s)
    waits = [turns.book(20.0, MOST_TURNS) for _ in range(1000)]
    assert waits == sorted(waits) and waits[0] == 1
    assert waits[-1] == pytest.approx(1 + 1000 / max(100, 1.25 * ended_per_s), abs=1)
    assert max(turns.book(20.0, MOST_TURNS) for _ in range(100_000)) == 60
    turns.clear()
    assert turns.book(20.0, MOST_TURNS) == 1


@pytest.mark.parametrize(
    "request_line, works",
    [
        ("POST /v1/chat/completions", True),
        ("POST /v1/responses/resp_1/cancel", False),
        ("GET /v1/models", False),
        ("GET /v1/responses/resp_1", False),
        ("GET /v1/responses/resp_1?stream=true", True),
        ("GET /v1/responses/resp_1?%73tream=True&starting_after=3", True),
        ("GET /v1/responses/resp_1?stream=false", False),
        ("GET /v1/responses/resp_1?upstream=true", False),
        ("DELETE /v1/responses/resp_1?stream=true", False),
    ],
)
def test_work_is_what_lasts_as_answers_do(request_line, works):
    method, target = request_line.split()
    path, _, query = target.partition("?")
    assert is_work({"method": method, "path": path, "query_string": query.encode()}) == works
