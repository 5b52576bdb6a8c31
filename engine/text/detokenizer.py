"""Generated tokens to final text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from engine.text.tokenizer import Tokenizer


class StopSearch:
    """Finds a string in a text that comes in pieces, in a time that is linear in the text (Knuth, Morris and
    Pratt): a caller chooses both.

    Attributes:
        text: the string, not empty.
        matched: how many of its first characters the text so far ends with, but not all of them.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = _borders(text)

    def feed(self, piece: str, counts: bool) -> int | None:
        """Read on; return the place in ``piece`` behind the string, if it is complete there first.

        Args:
            counts: False to pass over where it is complete.
        """
        text, borders, matched = self.text, self._borders, self.matched
        place, end = 0, len(piece)
        while place < end:
            if matched:
                character = piece[place]
                while matched and text[matched] != character:
                    matched = borders[matched - 1]
                matched += text[matched] == character
            else:
                place = piece.find(text[0], place)
                if place < 0:
                    break
                matched = 1
            place += 1
            if matched == len(text):
                matched = borders[-1]
                if counts:
                    return place
        self.matched = matched
        return None


@lru_cache(256)
def _borders(text: str) -> tuple[int, ...]:
    """For each of the first characters of ``text`` the length of the longest shorter beginning of ``text``
    with which ``text`` up to there ends."""
    found = [0]
    for character in text[1:]:
        matched = found[-1]
        while matched and text[matched] != character:
            matched = found[matched - 1]
        found.append(matched + (text[matched] == character))
    return tuple(found)


class IncrementalDetokenizer:
    """Text of one growing sequence. Constant time per token, whatever the length.

    What has been returned never changes: bytes that are not yet a whole character are held back, and so is
    any end of the text that may still become a stop string. Joined together the text is
    ``decode(prompt + tokens)`` without ``decode(prompt)``; only of broken UTF-8 spelled in byte tokens may
    less become U+FFFD, since the characters before it were returned already.

    Args:
        tokenizer: the model's.
        prompt_tail: the last few prompt tokens. They give no text, but a leading space is dropped only where
            nothing precedes it.
        stop: the text ends where one of these strings first is complete. Of several that are complete with
            the same character, the longest counts.
        include_stop: keep the stop string in the text.
        skip_special_tokens: special tokens give no text.
        min_tokens: a stop string counts only if a later token than this many completes it.

    Attributes:
        stop_reason: the stop string that ended the text, if one did.
        num_tokens_consumed: tokens taken so far, up to and with the one that completed a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_tail: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.stop_reason: str | None = None
        self.num_tokens_consumed = 0
        self._tokenizer, self._ascii = tokenizer, tokenizer.ascii_texts
        self._stops = [StopSearch(each) for each in dict.fromkeys(filter(None, stop))]
        self._include_stop = include_stop
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._min_tokens = min_tokens
        self._held = ""  # text that may still become a stop string
        self._at_start = True
        self._bytes: Any = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in prompt_tail:
            self._bytes.decode(self._piece(token))

    def append(self, token_ids: Sequence[int]) -> str:
        """New final text after these tokens. Tokens after a stop string are not looked at."""
        return "".join([self.append_one(token) for token in token_ids])

    def append_one(self, token: int) -> str:
        """:meth:`append` of one token."""
        if self.stop_reason is not None:
            return ""
        self.num_tokens_consumed += 1
        # Most tokens are whole by themselves, and need no decoder that remembers.
        text = self._ascii.get(token)
        if text is None or token in self._skipped or self._at_start or self._bytes.buffer:
            text = self._bytes.decode(self._piece(token))
        return self._push(text) if text and self._stops else text

    def finish(self) -> str:
        """The text that was held back; call once, when no token will follow. Broken bytes become U+FFFD."""
        if self.stop_reason is not None:
            return ""
        text = self._bytes.decode(b"", True)
        text = self._push(text) if self._stops else text
        if self.stop_reason is not None:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _piece(self, token: int) -> bytes:
        if token in self._skipped:
            return b""
        if not self._at_start:
            return self._tokenizer.token_bytes(token)
        self._at_start = False
        return self._tokenizer.first_token_bytes(token)

    def _push(self, text: str) -> str:
        counts = self.num_tokens_consumed > self._min_tokens
        ends = [(end, stop.text) for stop in self._stops if (end := stop.feed(text, counts)) is not None]
        whole = self._held + text
        if ends:
            # The one that is complete first; of several, the longest.
            end, self.stop_reason = min(ends, key=lambda found: (found[0], -len(found[1])))
            end += len(self._held)
            return whole[: end if self._include_stop else end - len(self.stop_reason)]
        held = 0 if self._include_stop else max(stop.matched for stop in self._stops)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]
