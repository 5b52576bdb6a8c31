"""The placeholder strings and tokens by which a family's prompts say where images and videos stand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from engine.families.base import PromptFormat
from engine.text.tokenizer import Tokenizer


class Placeholders:
    """The placeholder string of each kind of media, and its token where it is one.

    Attributes:
        kinds: the kinds of media that the family takes: ``image``, ``video``.
        ids: the placeholder token's id by kind, where the string is an added token of its own.
        split: the text must be split at the placeholder strings before it is tokenised.
        numbered: placeholder strings carry the item's number, so they may stand in any order.
        patterns: a regular expression of each placeholder string.
    """

    def __init__(self, prompt_format: PromptFormat, tokenizer: Tokenizer) -> None:
        given = {"image": prompt_format.image, "video": prompt_format.video}
        self._texts = {kind: text for kind, text in given.items() if text is not None}
        self.kinds = tuple(self._texts)
        added = {token.content: i for i, token in tokenizer.added_tokens.items()}
        self.ids = {kind: added[text] for kind, text in self._texts.items() if text in added}
        self.split = prompt_format.split_at_media or len(self.ids) < len(self._texts)
        self.numbered = any("{index}" in text for text in self._texts.values())
        self._patterns = {
            kind: re.escape(text).replace(re.escape("{index}"), r"\d{1,4}")
            for kind, text in self._texts.items()
        }
        self.patterns = list(self._patterns.values())
        self._any = re.compile("|".join(f"(?P<{k}>{p})" for k, p in self._patterns.items()) or "(?!)")

    def text(self, kind: str, number: int) -> str | None:
        """The placeholder string of a kind's ``number``-th item, from 1; None if the family takes no such."""
        text = self._texts.get(kind)
        return None if text is None else text.replace("{index}", str(number))

    def count(self, text: str) -> dict[str, int]:
        """The number of placeholder strings in ``text``, by kind; kinds without any are left out."""
        return dict(Counter(str(match.lastgroup) for match in self._any.finditer(text)))

    def surrounded(self, text: str, around: Callable[[str, int], tuple[str, str]]) -> str:
        """``text`` with further texts before and behind each placeholder string.

        Args:
            around: the two texts for a kind's ``n``-th placeholder string, from 0.
        """
        counts: Counter[str] = Counter()

        def replace(match: re.Match[str]) -> str:
            kind = str(match.lastgroup)
            before, behind = around(kind, counts[kind])
            counts[kind] += 1
            return before + match.group() + behind

        return self._any.sub(replace, text)

    def split_text(self, text: str) -> tuple[list[str], list[tuple[str, int | None]]]:
        """Split a text at its placeholder strings.

        Returns:
            The ``n + 1`` pieces around ``n`` placeholder strings, and the kind and number of each of those;
            the number is None where the family doesn't number them.
        """
        pieces, found, start = [], [], 0
        for match in self._any.finditer(text):
            kind = str(match.lastgroup)
            pieces.append(text[start : match.start()])
            numbered = "{index}" in self._texts[kind]
            digits = re.search(r"\d+", match.group()) if numbered else None
            found.append((kind, int(digits.group()) if digits else None))
            start = match.end()
        return [*pieces, text[start:]], found
