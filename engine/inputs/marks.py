"""The strings by which prompts mark pictures and videos."""

from __future__ import annotations

import re

from engine.families.base import PromptFormat
from engine.text.tokenizer import Tokenizer


class Marks:
    """The strings by which a family's prompts mark media.

    Attributes:
        ids: the mark's token id by kind, where it is an added token of its own.
        split: the text must be taken apart at the marks before it is tokenised.
        patterns: regular expressions of the marks that are no tokens.
    """

    def __init__(self, prompt_format: PromptFormat, tokenizer: Tokenizer) -> None:
        given = {"image": prompt_format.image, "video": prompt_format.video}
        self._texts = {kind: text for kind, text in given.items() if text is not None}
        added = {token.content: i for i, token in tokenizer.added_tokens.items()}
        self.ids = {kind: added[text] for kind, text in self._texts.items() if text in added}
        self.split = prompt_format.split_at_media or len(self.ids) < len(self._texts)
        self._patterns = {
            kind: re.escape(text).replace(re.escape("{index}"), r"\d{1,4}")
            for kind, text in self._texts.items()
        }
        self.patterns = list(self._patterns.values())
        self._any = re.compile("|".join(f"(?P<{k}>{p})" for k, p in self._patterns.items()) or "(?!)")

    def __bool__(self) -> bool:
        return bool(self._texts)

    def text(self, kind: str, number: int) -> str | None:
        """The mark of the ``number``-th item of a kind, from 1; None if the family has no such items."""
        text = self._texts.get(kind)
        return None if text is None else text.replace("{index}", str(number))

    def split_text(self, text: str) -> tuple[list[str], list[tuple[str, int | None]]]:
        """The text around the marks, and each mark's kind and number (None where marks carry none)."""
        chunks, marks, start = [], [], 0
        for match in self._any.finditer(text):
            kind = str(match.lastgroup)
            chunks.append(text[start : match.start()])
            numbered = "{index}" in self._texts[kind]
            digits = re.search(r"\d+", match.group()) if numbered else None
            marks.append((kind, int(digits.group()) if digits else None))
            start = match.end()
        return [*chunks, text[start:]], marks
