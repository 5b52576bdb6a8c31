"""Counts the tokens of thoughts."""

from collections.abc import Callable
from typing import Protocol

from engine.outputs import OutputDelta
from engine.parsers.answer import AnswerParser


class Spelling(Protocol):
    """Text and bytes of tokens; see :class:`engine.text.tokenizer.Tokenizer`."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def first_token_bytes(self, token_id: int) -> bytes: ...


class ThoughtTokens:
    """Counts the tokens of one choice that belong to its thought.

    How many tokens a delta holds depends on how far behind its reader is, and it doesn't say where the text
    of each ends. So tokens are placed by their bytes, and the count is the same however the answer comes in
    deltas. A token counts if any of it stands behind the tag that opens the thought, up to the end
    of the tag that closes it.

    Args:
        make_parser: makes a parser of the choice.
        spelling: of the tokens.

    Attributes:
        count: tokens so far.
    """

    def __init__(self, make_parser: Callable[[], AnswerParser | None], spelling: Spelling) -> None:
        self._make_parser, self._spelling = make_parser, spelling
        self._texts: list[str] = []
        self._length = 0
        # Where tokens begin and the last one ends, and where the thought begins, in bytes.
        self._bounds = [0]
        self._begin: int | None = None
        self._settled = False
        self.count = 0

    def add(self, delta: OutputDelta, parser: AnswerParser) -> int:
        """Count the tokens of the next delta, which ``parser`` has read.

        Returns:
            How many of them, the last ones, can belong to what comes behind the thought.
        """
        if self._settled:
            return len(delta.token_ids)
        if parser.thought == "none":
            self._settle()
            return len(delta.token_ids)
        before = self._length
        self._texts.append(delta.text)
        self._length += len(delta.text)
        for token in delta.token_ids:
            spell = self._spelling.token_bytes if len(self._bounds) > 1 else self._spelling.first_token_bytes
            self._bounds.append(self._bounds[-1] + len(spell(token)))
            self.count += self._begin is not None and self._bounds[-1] > self._begin
        if self._begin is None and parser.thought in ("inside", "after"):
            self._begin = self._where(before, ("inside", "after"))
            self.count = sum(bound > self._begin for bound in self._bounds)
        if parser.thought == "after":
            end = self._where(before, ("after",))
            behind = sum(start >= end for start in self._bounds[:-1])
            self.count -= behind
            self._settle()
            return behind
        return 0 if parser.thought == "inside" else len(delta.token_ids)

    def _where(self, low: int, states: tuple[str, ...]) -> int:
        """The number of bytes after which the thought is in one of ``states``: more than the first ``low``
        characters, or none."""
        text, high = "".join(self._texts), self._length
        made = self._make_parser()
        if made is not None and made.thought in states:
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            parser = self._make_parser()
            assert parser is not None
            parser.feed(text[:middle])
            low, high = (low, middle) if parser.thought in states else (middle, high)
        return len(text[:high].encode(errors="replace"))

    def _settle(self) -> None:
        self._settled = True
        self._texts, self._bounds = [], [0]
