"""Log-probabilities of an answer's tokens, with texts and bytes that join up to the answer."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.logprobs import LogprobTensors
from engine.outputs import TokenLogprob
from engine.text.token_texts import TokenTexts

Row = dict[int, TokenLogprob]


def token_row(
    values: LogprobTensors,
    index: int,
    token: int,
    count: int,
    texts: TokenTexts,
    *,
    wanted: Sequence[int] = (),
    adds_text: bool = True,
) -> Row:
    """Log-probabilities of one token and others: the token itself first, then the likeliest, then the wanted.

    Args:
        values: on the host.
        index: the token's row of ``values``.
        count: alternatives.
        texts: the sequence so far; the token is added to it.
        wanted: the tokens of which ``values`` has log-probabilities by id.
        adds_text: whether the token is part of the text, which one that ends an answer is not.
    """
    tops = zip(values.top_ids[index].tolist(), values.top_logprobs[index].tolist(), strict=True)
    others = {
        other: TokenLogprob(value, rank, *texts.look(other))
        for rank, (other, value) in enumerate(list(tops)[:count], start=1)
        if other != token
    }
    if wanted:
        assert values.wanted_logprobs is not None
        for other, value in zip(wanted, values.wanted_logprobs[index].tolist(), strict=False):
            if other != token and other not in others:
                others[other] = TokenLogprob(value, None, *texts.look(other))
    text, piece = texts.take(token) if adds_text else (texts.name(token), b"")
    chosen = TokenLogprob(float(values.token_logprobs[index]), int(values.ranks[index]), text, piece)
    return {token: chosen, **others}


class UnsettledRows:
    """Tokens and rows of one answer whose text is held back, since it may become part of a stop string.

    The rows come out with their text. Those of the stop string itself, which is no part of the answer, come
    out without bytes at the end.
    """

    def __init__(self) -> None:
        # With the position of the first character, and the number of last bytes that begin another one.
        self._rows: deque[tuple[int, Row, int, int]] = deque()
        self._added = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int, row: Row) -> None:
        first, piece = self._added, row[token].bytes
        self.pass_over(row[token].decoded_token or "", piece)
        begun = min(len(piece), len(self._decoder.getstate()[0]))
        self._rows.append((token, row, first, begun))

    def pass_over(self, text: str, piece: bytes) -> None:
        """Count a token whose row came out of another engine."""
        self._decoder.decode(piece)
        if piece:
            self._added += len(text)

    def settle(self, num_characters: int) -> Iterator[tuple[int, Row]]:
        """The next tokens and rows whose text lies in the first ``num_characters`` of the answer."""
        while self._rows:
            token, row, first, begun = self._rows[0]
            found = row[token]
            last = first + len(found.decoded_token or "")
            # A character that the token begins may become part of a stop string.
            if found.bytes and (last > num_characters or (begun and last == num_characters)):
                return
            self._rows.popleft()
            yield token, row

    def end(self, num_characters: int) -> Iterator[tuple[int, Row]]:
        """All that are left, of an answer that has ended with ``num_characters``."""
        yield from self.settle(num_characters)
        for token, row, first, begun in self._rows:
            found = row[token]
            text = found.decoded_token or ""
            kept = min(len(text), max(0, num_characters - first))
            if found.bytes and first + len(text) >= num_characters:
                size = len(found.bytes) - begun - len(text[kept:].encode()) if kept else 0
                found = replace(found, decoded_token=text[:kept] if kept else text, bytes=found.bytes[:size])
            yield token, {**row, token: found}
        self._rows.clear()
