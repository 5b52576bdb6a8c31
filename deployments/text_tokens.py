"""Tells which tokens of an answer with log-probabilities belong to its visible text."""

from collections.abc import Iterator
from dataclasses import replace

from deployments.answers import ChoiceDelta
from engine.outputs import OutputDelta, TokenLogprob
from engine.parsers.events import Event, Text

_Row = dict[int, TokenLogprob]


class TokenByToken:
    """Cuts the deltas of one choice into one for each token, with the text that the token adds.

    How many tokens a delta holds depends on how far behind its reader is; what is made of single tokens does
    not. A part of a token's text may come before the token, as the rest may become a stop string. It waits
    for the token here.
    """

    def __init__(self) -> None:
        self._text = ""

    def cut(self, delta: OutputDelta) -> Iterator[OutputDelta]:
        """The delta itself if it has no log-probabilities."""
        if not delta.logprobs:
            yield replace(delta, text=self._text + delta.text)
            self._text = ""
            return
        self._text += delta.text
        last = len(delta.token_ids) - 1
        for index, (token, row) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
            ends = index == last and delta.finish_reason is not None
            size = len(self._text) if ends else len(_piece(token, row))
            text, self._text = self._text[:size], self._text[size:]
            piece = replace(delta, text=text, token_ids=[token], logprobs=[row])
            yield piece if ends else replace(piece, finish_reason=None, stop_reason=None)


class TextTokens:
    """Finds the tokens of one choice that belong to its visible text.

    The parser may hold back the text of a token, and an event does not say where in the answer it stands. So
    tokens wait for the next text. Those of a thought, a call and its tags are left out; white space before a
    text, which the parser may drop, belongs to the text.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, _Row]] = []
        self._last: Event | None = None

    def add(self, delta: ChoiceDelta) -> list[tuple[int, _Row]]:
        """The tokens whose text has come by now, with their log-probabilities.

        Args:
            delta: of one token; see :class:`TokenByToken`.
        """
        if delta.num_thought:
            self._waiting = []
        begin = delta.num_thought
        here = list(zip(delta.token_ids[begin:], (delta.logprobs or ())[begin:], strict=False))
        self._waiting += here
        found: list[tuple[int, _Row]] = []
        for event in delta.events:
            if isinstance(event, Text):
                if not isinstance(self._last, Text | None):
                    self._leave_tags_out(event.text)
                found += self._waiting
                self._waiting = here = []
            else:
                # This token may have the beginning of a text behind it.
                self._waiting = list(here)
            self._last = event
        if delta.finish_reason is not None and isinstance(self._last, Text):
            # Tokens of the stop string, as chats have them.
            found += self._waiting
            self._waiting = []
        return found

    def _leave_tags_out(self, text: str) -> None:
        """Drop the waiting tokens before ``text`` and the white space in front of it."""
        pieces = [_piece(*each) for each in self._waiting]
        start = "".join(pieces).rfind(text)
        end, first = 0, 0
        for index, piece in enumerate(pieces):
            end += len(piece)
            if end <= start and piece.strip():
                first = index + 1
        del self._waiting[:first]


def _piece(token: int, row: _Row) -> str:
    """The text that a token completes."""
    return (row[token].decoded_token or "") if row[token].bytes else ""
