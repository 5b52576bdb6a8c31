"""Counts the embedding rows that running requests still need."""

from __future__ import annotations

from engine.request import Request


class EncoderLedger:
    """A budget of embedding rows. Rows are held from admission until their placeholders are computed.

    Args:
        budget: most rows held at once.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: dict[str, int] = {}
        self.num_held = 0

    def rows_from(self, request: Request, position: int) -> int:
        """Rows that computing ``request`` from prompt ``position`` on needs."""
        return sum(span.item.num_tokens - span.rows_before(position) for span in request.spans)

    def fits(self, rows: int) -> bool:
        return self.num_held + rows <= self.budget

    def hold(self, request: Request, position: int) -> None:
        """Set what ``request`` holds to the rows it needs from ``position`` on."""
        rows = self.rows_from(request, position) if request.spans else 0
        self.num_held += rows - self._held.pop(request.id, 0)
        if rows:
            self._held[request.id] = rows

    def release(self, request: Request) -> None:
        self.num_held -= self._held.pop(request.id, 0)

    def check_idle(self) -> None:
        assert self.num_held == 0 and not self._held, f"embedding rows still held: {self._held}"
