"""Generated tokens to final text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from engine.text.tokenizer import Tokenizer


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
        self._stops = sorted(set(filter(None, stop)), key=len, reverse=True)
        self._include_stop = include_stop
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._min_tokens = min_tokens
        self._context = len(self._stops[0]) - 1 if self._stops else 0
        self._window = ""  # text that can still be part of a stop string
        self._returned = 0  # characters of the window that were returned already
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
        rest = self._window[self._returned :]
        self._returned = len(self._window)
        return text + rest

    def _piece(self, token: int) -> bytes:
        if token in self._skipped:
            return b""
        if not self._at_start:
            return self._tokenizer.token_bytes(token)
        self._at_start = False
        return self._tokenizer.first_token_bytes(token)

    def _push(self, text: str) -> str:
        known = len(self._window)
        window = self._window + text
        # A match must end in the new text; an earlier one would have been seen before.
        match = self._first_match(window, known) if self.num_tokens_consumed > self._min_tokens else None
        if match is not None:
            start, self.stop_reason = match
            end = start + len(self.stop_reason) if self._include_stop else start
            return window[self._returned : end]
        final = len(window) if self._include_stop else len(window) - self._held(window)
        out = window[self._returned : final]
        cut = max(0, min(final, len(window) - self._context))
        self._window = window[cut:]
        self._returned = final - cut
        return out

    def _first_match(self, window: str, known: int) -> tuple[int, str] | None:
        """The stop string that is complete first in ``window`` beyond its first ``known`` characters."""
        best: tuple[int, int, str] | None = None  # end, start
        for stop in self._stops:
            start = window.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start, stop)
                best = found if best is None else min(best, found)
        return None if best is None else (best[1], best[2])

    def _held(self, window: str) -> int:
        """Length of the longest end of ``window`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = max(0, len(window) - len(stop) + 1)
            while (start := window.find(stop[0], start)) >= 0 and len(window) - start > longest:
                if stop.startswith(window[start:]):
                    longest = len(window) - start
                    break
                start += 1
        return longest
