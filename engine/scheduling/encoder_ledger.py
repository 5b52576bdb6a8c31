"""Counts the embedding rows that requests hold for placeholders that are not computed yet."""

from __future__ import annotations

from engine.request import Request


class EncoderLedger:
    """Embedding rows by request, from its arrival until its placeholders are computed.

    Most rows belong to waiting requests: a step computes prompts one after the other, so that at most one
    running request has rows left. A caller that encodes ahead of the scheduler must ask :meth:`fits` first;
    then the budget bounds the memory.

    Args:
        budget: most rows to hold at once, and of one request.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: dict[str, int] = {}
        self.num_held = 0

    def fits(self, rows: int) -> bool:
        """Return whether ``rows`` more stay within the budget."""
        return self.num_held + rows <= self.budget

    def hold(self, request: Request, position: int) -> None:
        """Set the rows of ``request`` to those that its prompt needs from ``position`` on."""
        rows = rows_from(request, position) if request.spans else 0
        self.num_held += rows - self._held.pop(request.id, 0)
        if rows:
            self._held[request.id] = rows

    def release(self, request: Request) -> None:
        self.num_held -= self._held.pop(request.id, 0)

    def check_idle(self) -> None:
        assert self.num_held == 0 and not self._held, f"embedding rows still held: {self._held}"


def rows_from(request: Request, position: int) -> int:
    """Return the number of embedding rows that the tokens from ``position`` on take."""
    return sum(span.item.num_tokens - span.rows_before(position) for span in request.spans)
