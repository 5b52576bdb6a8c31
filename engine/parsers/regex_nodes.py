"""Reads a regex of Rust's dialect, as llguidance takes it, as a tree that can be written in another form."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property

#: Stands for all characters beyond ASCII in sets of characters: some of them may be there.
OTHERS = "\x80"
_ASCII = frozenset(map(chr, range(0x80)))
_ALL = _ASCII | {OTHERS}
_NONE: frozenset[str] = frozenset()
_MOST_DEPTH = 32

_REPEAT = re.compile(r"[*+?]|\{([0-9]{1,6})(?:(,)([0-9]{1,6})?)?\}")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_][A-Za-z0-9_]*>|:))?")
_CODE_POINT = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|[xuU]\{([0-9a-fA-F]{1,8})\})"
)
_PROPERTY = re.compile(r"\\([pP])(?:([A-Z])|\{(\^?)([A-Za-z_]{1,40})\})")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
_LETTERS, _DIGITS = frozenset(string.ascii_letters), frozenset(string.digits)
_SPACES = frozenset("\t\n\v\f\r ")
_PERL = {"d": _DIGITS | {OTHERS}, "w": _LETTERS | _DIGITS | {"_", OTHERS}, "s": _SPACES | {OTHERS}}
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")
_PUNCTUATION = frozenset(string.punctuation)
_POSIX_CLASSES = {
    "alnum": _LETTERS | _DIGITS,
    "alpha": _LETTERS,
    "ascii": _ASCII,
    "blank": frozenset("\t "),
    "cntrl": frozenset(map(chr, [*range(0x20), 0x7F])),
    "digit": _DIGITS,
    "graph": _LETTERS | _DIGITS | _PUNCTUATION,
    "lower": frozenset(string.ascii_lowercase),
    "print": _LETTERS | _DIGITS | _PUNCTUATION | {" "},
    "punct": _PUNCTUATION,
    "space": _SPACES,
    "upper": frozenset(string.ascii_uppercase),
    "word": _LETTERS | _DIGITS | {"_"},
    "xdigit": frozenset(string.hexdigits),
}
#: The characters of properties in ASCII, beside the general categories.
_PROPERTIES = {
    **dict.fromkeys(("Letter", "Alphabetic", "Latin"), _LETTERS),
    "Lowercase": frozenset(string.ascii_lowercase),
    "Uppercase": frozenset(string.ascii_uppercase),
    "Number": _DIGITS,
    "White_Space": _SPACES,
    **dict.fromkeys(
        ("Greek", "Cyrillic", "Han", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew"), _NONE
    ),
}


class RegexUnread(Exception):
    """A regex is malformed, or uses what isn't read."""


@dataclass(frozen=True)
class Atom:
    """One character.

    All nodes have these attributes, but for ``single``.

    Attributes:
        text: the regex.
        characters: those that may come, in ASCII, and :data:`OTHERS`.
        single: the only one; None for a class.
        nullable: whether the empty text matches.
        first: the characters that may come first.
        tail: characters by which a text that matches may go on to a longer one. There may be fewer.
    """

    text: str
    characters: frozenset[str]
    single: str | None = None
    nullable = False
    tail = _NONE

    @property
    def first(self) -> frozenset[str]:
        return self.characters


@dataclass(frozen=True)
class Chain:
    """Parts behind each other."""

    parts: tuple[Node, ...]

    @cached_property
    def text(self) -> str:
        return "".join(
            part.text if not isinstance(part, Choice) else f"(?:{part.text})" for part in self.parts
        )

    @cached_property
    def characters(self) -> frozenset[str]:
        return _NONE.union(*(part.characters for part in self.parts))

    @cached_property
    def nullable(self) -> bool:
        return all(part.nullable for part in self.parts)

    @cached_property
    def first(self) -> frozenset[str]:
        found = _NONE
        for part in self.parts:
            found |= part.first
            if not part.nullable:
                break
        return found

    @cached_property
    def tail(self) -> frozenset[str]:
        found = _NONE
        for part in self.parts:
            if found & part.first:
                # What stands before may end at several places, and each leads elsewhere.
                return self.characters
            found = part.tail | (found | part.first if part.nullable else _NONE)
        return found


@dataclass(frozen=True)
class Choice:
    """One of several parts."""

    parts: tuple[Node, ...]

    @cached_property
    def text(self) -> str:
        return "|".join(part.text for part in self.parts)

    @cached_property
    def characters(self) -> frozenset[str]:
        return _NONE.union(*(part.characters for part in self.parts))

    @cached_property
    def nullable(self) -> bool:
        return any(part.nullable for part in self.parts)

    @cached_property
    def first(self) -> frozenset[str]:
        return _NONE.union(*(part.first for part in self.parts))

    @cached_property
    def tail(self) -> frozenset[str]:
        found = _NONE.union(*(part.tail for part in self.parts))
        if self.nullable:
            found |= self.first
        # Where two begin alike, one may be the beginning of the other.
        alike = sum(len(part.first) for part in self.parts) > len(self.first)
        longer = any(not isinstance(part, Atom) for part in self.parts)
        return self.characters if alike and longer else found


@dataclass(frozen=True)
class Repeat:
    """A part as often as ``operator`` says: ``*``, ``+``, ``?`` or a count in braces."""

    part: Node
    operator: str

    @cached_property
    def text(self) -> str:
        inner = self.part.text if isinstance(self.part, Atom) else f"(?:{self.part.text})"
        return inner + self.operator

    @cached_property
    def characters(self) -> frozenset[str]:
        return self.part.characters

    @cached_property
    def nullable(self) -> bool:
        return self.operator in "*?" or self.operator.startswith(("{0", "{,")) or self.part.nullable

    @cached_property
    def first(self) -> frozenset[str]:
        return self.part.first

    @cached_property
    def tail(self) -> frozenset[str]:
        if self.repeats and self.part.tail & self.part.first:
            return self.characters
        low, comma, high = self.operator.strip("{}").partition(",")
        exact = low == high or (low.isdigit() and not comma)
        return self.part.tail if exact else self.part.first | self.part.tail

    @property
    def options(self) -> tuple[Node, ...]:
        """The parts of which one comes each time."""
        return self.part.parts if isinstance(self.part, Choice) else (self.part,)

    @property
    def repeats(self) -> bool:
        """The part may come more than once."""
        return self.operator not in ("?", "{0}", "{1}", "{0,0}", "{0,1}", "{1,1}")


Node = Atom | Chain | Choice | Repeat


def character(text: str, *, any_case: bool = False) -> Atom:
    """The atom of one character."""
    escaped = f"\\x{{{ord(text):X}}}"
    if any_case and text.lower() != text.upper():
        return Atom(f"(?i:{escaped})", _set_of(text.lower()) | _set_of(text.upper()))
    return Atom(escaped, _set_of(text), text)


def character_range(low: str, high: str) -> Node:
    """The characters from one to another."""
    return read_regex(f"[\\x{{{ord(low):X}}}-\\x{{{ord(high):X}}}]", "")


def read_regex(pattern: str, flags: str) -> Node:
    """The tree of a regex.

    Args:
        flags: some of ``i``, ``m``, which says nothing, and ``s``.

    Raises:
        RegexUnread: with the reason.
    """
    if unknown := set(flags) - set("ims"):
        raise RegexUnread(f"the flag {min(unknown)} is not supported")
    return _Reader(pattern, "i" in flags, "s" in flags).read()


class _Reader:
    def __init__(self, pattern: str, any_case: bool, dot_all: bool) -> None:
        self._pattern, self._any_case, self._dot_all = pattern, any_case, dot_all
        self._place = 0

    def read(self) -> Node:
        found = self._choice(0)
        if self._place < len(self._pattern):
            raise RegexUnread("it closes a group that it has not opened")
        return found

    def _choice(self, depth: int) -> Node:
        if depth > _MOST_DEPTH:
            raise RegexUnread("its groups are nested too deeply")
        options: list[Node] = []
        parts: list[Node] = []
        while self._place < len(self._pattern) and self._pattern[self._place] != ")":
            if self._pattern[self._place] == "|":
                self._place += 1
                options.append(_joined(parts))
                parts = []
                continue
            part = self._part(depth)
            if repeat := _REPEAT.match(self._pattern, self._place):
                self._place = repeat.end()
                if self._pattern[self._place : self._place + 1] in ("?", "+", "*"):
                    raise RegexUnread("lazy and possessive repetition is not supported")
                part = Repeat(part, repeat[0])
            parts.append(part)
        options.append(_joined(parts))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _part(self, depth: int) -> Node:
        pattern, place = self._pattern, self._place
        found = pattern[place]
        if found == "(":
            group = _GROUP.match(pattern, place)
            if group is None or pattern.startswith("?", group.end()):
                raise RegexUnread("look-around, and flags within it, are not supported")
            self._place = group.end()
            inner = self._choice(depth + 1)
            if not pattern.startswith(")", self._place):
                raise RegexUnread("it has a group without an end")
            self._place += 1
            return inner
        if found in "^$":
            raise RegexUnread("anchors are not supported: all of a terminal matches")
        if found in "*+?{":
            raise RegexUnread(f"{found} stands where nothing can be repeated by it")
        if found == ".":
            self._place += 1
            return Atom("(?s:.)", _ALL) if self._dot_all else Atom(".", _ALL - {"\n"})
        if found == "[":
            characters, self._place = _class(pattern, place, 0)
            return self._atom(pattern[place : self._place], characters, None)
        if found == "\\":
            characters, single, self._place = _escape(pattern, place)
            return self._atom(pattern[place : self._place], characters, single)
        self._place += 1
        return character(found, any_case=self._any_case)

    def _atom(self, text: str, characters: frozenset[str], single: str | None) -> Node:
        if single is not None:
            return character(single, any_case=self._any_case)
        if self._any_case:
            folded = {each for one in characters for each in (one.lower(), one.upper())}
            return Atom(f"(?i:{text})", frozenset(folded))
        return Atom(text, characters)


def _joined(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _escape(pattern: str, place: int) -> tuple[frozenset[str], str | None, int]:
    """The characters of an escape, the only one if it has one, and its end."""
    letter = pattern[place + 1 : place + 2]
    if found := _CODE_POINT.match(pattern, place):
        code = int(next(filter(None, found.groups())), 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise RegexUnread(f"{found[0]} is no character")
        return _set_of(chr(code)), chr(code), found.end()
    if found := _PROPERTY.match(pattern, place):
        characters = _of_property(found[2] or found[4])
        negated = (found[1] == "P") != bool(found[3])
        return _without(characters) if negated else characters, None, found.end()
    if letter and letter.lower() in _PERL:
        characters = _PERL[letter.lower()]
        return _without(characters) if letter.isupper() else characters, None, place + 2
    if letter in _CONTROLS:
        return _set_of(_CONTROLS[letter]), _CONTROLS[letter], place + 2
    if not letter or letter.isalnum() or letter in "<>":
        raise RegexUnread(f"the escape \\{letter} is not supported")
    return _set_of(letter), letter, place + 2


def _set_of(text: str) -> frozenset[str]:
    return frozenset({text if text in _ASCII else OTHERS})


def _without(characters: frozenset[str]) -> frozenset[str]:
    return (_ASCII - characters) | {OTHERS}


def _of_property(name: str) -> frozenset[str]:
    if name in _PROPERTIES:
        return _PROPERTIES[name] | {OTHERS}
    if len(name) > 2:
        raise RegexUnread(f"the property {name} is not supported; general categories such as L are")
    return frozenset(each for each in _ASCII if unicodedata.category(each).startswith(name)) | {OTHERS}


def _class(pattern: str, place: int, depth: int) -> tuple[frozenset[str], int]:
    """The characters of a class in brackets, and its end."""
    if depth > _MOST_DEPTH:
        raise RegexUnread("its classes are nested too deeply")
    place += 1
    negated = pattern.startswith("^", place)
    place += negated
    found, union, operation, first = _ALL, _NONE, "&&", True
    while pattern.startswith("-", place):
        # Not the operation, but characters.
        union, first, place = _set_of("-"), False, place + 1
    if pattern.startswith(("&&", "~~"), place) and first:
        raise RegexUnread("a class can't begin with && or ~~")
    while place < len(pattern):
        two = pattern[place : place + 2]
        if pattern[place] == "]" and not first:
            found = _combined(found, operation, union)
            return _without(found) if negated else found, place + 1
        if two in ("&&", "--", "~~"):
            found, union, operation = _combined(found, operation, union), _NONE, two
            place += 2
            continue
        first = False
        characters, place = _member(pattern, place, depth)
        union |= characters
    raise RegexUnread("it has a class without an end")


def _member(pattern: str, place: int, depth: int) -> tuple[frozenset[str], int]:
    """The characters of a class within a class, an escape, a character or a range; and its end."""
    if posix := _POSIX.match(pattern, place):
        characters = _POSIX_CLASSES.get(posix[2])
        if characters is None:
            raise RegexUnread(f"the class {posix[0]} is unknown")
        return _without(characters) if posix[1] else characters, posix.end()
    if pattern[place] == "[":
        return _class(pattern, place, depth + 1)
    characters, low, place = _one(pattern, place)
    if low is None or pattern[place : place + 1] != "-" or pattern[place + 1 : place + 2] in "]-":
        return characters, place
    _, high, place = _one(pattern, place + 1)
    if high is None or high < low:
        raise RegexUnread("it has a range without an order")
    ascii_part = frozenset(each for each in _ASCII if low <= each <= high)
    return ascii_part | ({OTHERS} if high not in _ASCII else _NONE), place


def _one(pattern: str, place: int) -> tuple[frozenset[str], str | None, int]:
    if pattern[place] == "\\":
        return _escape(pattern, place)
    return _set_of(pattern[place]), pattern[place], place + 1


def _combined(one: frozenset[str], operation: str, other: frozenset[str]) -> frozenset[str]:
    """The characters of a class by one of its operations. Of those beyond ASCII it is not known which."""
    unsure = {OTHERS} & (one if operation == "--" else one | other)
    if operation == "&&":
        return one & other
    return (one - other if operation == "--" else one ^ other) | unsure
