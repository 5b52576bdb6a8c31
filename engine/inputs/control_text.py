"""Stops control strings typed by a caller from acting as special tokens (prompt injection)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.text.tokenizer import Tokenizer

_FIRST_STAND_IN = 0xF0000  # private use, planes 15 and 16
_LAST_STAND_IN = 0x10FFF0
#: Unicode's White_Space, which tokens with ``lstrip`` or ``rstrip`` swallow. Python's own strip() removes
#: U+001C to U+001F as well.
_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True, slots=True)
class StandIns:
    """Private-use characters in place of control strings that a caller typed.

    Attributes:
        originals: the string that each character replaces; "" belongs to a border across which nothing may
            join.
    """

    originals: Mapping[str, str]

    def restore(self, text: str) -> str:
        """``text`` with the caller's own strings again."""
        if not self.originals:
            return text
        return text.translate({ord(key): value for key, value in self.originals.items()})


class ControlText:
    """Tells a prompt's own control strings from those in callers' texts.

    Args:
        tokenizer: its special tokens are control strings.
        placeholders: patterns of the placeholder strings of media, which are control strings as well.
    """

    def __init__(self, tokenizer: Tokenizer, placeholders: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        contents = {tokenizer.added_tokens[i].content for i in tokenizer.special_ids}
        patterns = [re.escape(text) for text in sorted(contents, key=len, reverse=True) if text]
        patterns += [pattern for pattern in placeholders if pattern not in patterns]
        self._control = re.compile("|".join(patterns) or "(?!)")
        self._placeholder = re.compile("|".join(placeholders) or "(?!)")
        added = sorted(tokenizer.added_tokens.items(), key=lambda item: -len(item[1].content))
        self._ids = {token.content: i for i, token in added}
        self._token = re.compile(
            "|".join(_token_pattern(token) for _, token in added if token.content) or "(?!)"
        )

    def protect(self, messages: Sequence[Mapping[str, Any]], *others: Any) -> tuple[list[Any], StandIns]:
        """Replace control strings in everything that callers wrote.

        Args:
            messages: plain JSON; the text parts of one message are also searched as one text.
            others: further JSON, such as tools.

        Returns:
            ``[messages, *others]`` and the characters put in. Nothing is copied if nothing is found.
        """
        given = [list(messages), *others]
        strings: list[str] = []
        _add_strings(given, strings)
        split = [message for message in messages if self._joins(message)]
        found = {match for text in strings for match in self._control.findall(text)}
        if not found and not split:
            return given, StandIns({})
        border, stand_ins = _stand_ins(found, strings)
        prepared = [_with_borders(m, border) if m in split else m for m in messages]

        def replaced(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(lambda match: stand_ins[match.group()], value)
            if isinstance(value, Mapping):
                return {replaced(key): replaced(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [replaced(item) for item in value]
            return value

        originals = {character: text for text, character in stand_ins.items()}
        return [replaced(value) for value in [prepared, *others]], StandIns({border: "", **originals})

    def protect_placeholders(self, text: str) -> tuple[str, StandIns]:
        """Replace the placeholder strings of media in a raw prompt; its other control strings stay."""
        found = set(self._placeholder.findall(text))
        if not found:
            return text, StandIns({})
        _, stand_ins = _stand_ins(found, [text])
        protected = self._placeholder.sub(lambda match: stand_ins[match.group()], text)
        return protected, StandIns({character: text for text, character in stand_ins.items()})

    def encode(
        self, text: str, stand_ins: StandIns, *, add_special_tokens: bool, at_start: bool = True
    ) -> list[int]:
        """Token ids of a rendered text; control strings that callers typed become plain text.

        Without stand-ins the ids are the tokenizer's own.

        Args:
            at_start: as for :meth:`Tokenizer.encode_plain`.
        """
        if at_start and not stand_ins.originals:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        position = 0
        for match in self._token.finditer(text):
            token = self._tokenizer.added_tokens[self._ids[match.group()]]
            before = text[position : match.start()]
            before = before.rstrip(_SPACE) if token.lstrip else before
            ids += self._plain(before, stand_ins, at_start and position == 0)
            ids.append(self._ids[match.group()])
            position = match.end()
            if token.rstrip:
                position += len(text) - position - len(text[position:].lstrip(_SPACE))
        ids += self._plain(text[position:], stand_ins, at_start and position == 0)
        return self._tokenizer.with_special_tokens(ids) if add_special_tokens else ids

    def _plain(self, text: str, stand_ins: StandIns, at_start: bool) -> list[int]:
        return self._tokenizer.encode_plain(stand_ins.restore(text), at_start=at_start)

    def _joins(self, message: Mapping[str, Any]) -> bool:
        """Return whether a control string would arise where two text parts of the message touch."""
        content = message.get("content")
        if not isinstance(content, list):
            return False
        texts = [part["text"] for part in content if "text" in part]
        if len(texts) < 2:
            return False
        whole = "".join(texts)
        return len(self._control.findall(whole)) != sum(len(self._control.findall(text)) for text in texts)


def _stand_ins(found: Iterable[str], strings: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A border and a character for each of ``found``, all of which none of ``strings`` has."""
    taken = {c for text in strings for c in text if ord(c) >= _FIRST_STAND_IN}
    free = (chr(c) for c in range(_FIRST_STAND_IN, _LAST_STAND_IN) if chr(c) not in taken)
    return next(free), dict(zip(sorted(found), free, strict=False))


def _token_pattern(token: Any) -> str:
    pattern = re.escape(token.content)
    return rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern


def _with_borders(message: Mapping[str, Any], border: str) -> dict[str, Any]:
    parts = [
        {**part, "text": part["text"] + border} if "text" in part else part for part in message["content"]
    ]
    return {**message, "content": parts}


def _add_strings(value: Any, found: list[str]) -> None:
    """Append every string in JSON-like data to ``found``, keys included."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_strings(item, found)
    elif isinstance(value, (dict, Mapping)):
        # Nearly all mappings are dicts, and a check against the abstract class takes several times as long.
        for key, item in value.items():
            _add_strings(key, found)
            _add_strings(item, found)
