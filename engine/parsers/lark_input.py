"""A caller's Lark grammar of a text, as a part of the grammar of the call that holds the text.

Callers send what OpenAI documents for custom tools: rules, terminals, strings, regexes, ``%ignore``, and
``%import`` from ``common``, in llguidance's dialect of Lark. A call holds the text as it stands, or within a
JSON string, where each character is spelled as ``json.dumps`` spells it.

llguidance takes the longest lexeme and never gives a part of it back. In a JSON string many characters begin
with the same ``\\``, and a text that stands as it is ends with a line feed that may be a part of it, too. So
these characters become lexemes of their own, and a terminal that may hold them becomes a rule of the lexemes
between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeGuard, TypeVar

from engine.errors import InvalidRequest
from engine.parsers.regex_nodes import (
    Atom,
    Chain,
    Choice,
    Node,
    RegexUnread,
    Repeat,
    character,
    character_range,
    read_regex,
)

_FLOAT = r"([0-9]+[eE][+-]?[0-9]+|([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)"
_NUMBER = r"([0-9]+([eE][+-]?[0-9]+)?|([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)"
#: Terminals of Lark's library ``common``.
_COMMON = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"([0-9]+\.[0-9]*|\.[0-9]+)",
    "FLOAT": _FLOAT,
    "SIGNED_FLOAT": "[+-]?" + _FLOAT,
    "NUMBER": _NUMBER,
    "SIGNED_NUMBER": "[+-]?" + _NUMBER,
    "ESCAPED_STRING": r'"([^"\\\n]|\\[^\n])*"',
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[a-zA-Z]",
    "WORD": "[a-zA-Z]+",
    "CNAME": "[a-zA-Z_][a-zA-Z0-9_]*",
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"\/\/[^\n]*",
    "SQL_COMMENT": r"--[^\n]*",
}

_TOKEN = re.compile(
    r"""
    (?P<skip>(?:[ \t\r\f]|(?://|\#)[^\n]*)++)
    |(?P<line>\n)
    |(?P<string>"(?:\\.|[^"\\\n])*+"i?)
    |(?P<regex>/(?:\\.|[^/\\])++/[a-z]*)
    |(?P<rule>[!?]*_*[a-z][a-z0-9_-]*)
    |(?P<terminal>_*[A-Z][A-Z0-9_-]*)
    |(?P<number>[0-9]{1,6})
    |(?P<directive>%[a-z]*)
    |(?P<mark>->|\.\.|[:|()\[\]{},.~+*?])
    """,
    re.VERBOSE,
)
_STRING_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|x([0-9a-fA-F]{2}))')
#: Brackets within brackets, and terminals within terminals.
_MOST_DEPTH = 32
#: Characters of an expression that is a rule of its own, so that what holds it twice doesn't double it.
_LONG = 60
#: Characters of the grammar's new form, which a terminal of terminals could double again and again.
_MOST_WRITTEN = 128 * 1024

#: Characters that JSON escapes, and those of them that it spells with two characters.
_ESCAPED = frozenset([*map(chr, range(0x20)), '"', "\\"])
_SHORT = frozenset('\n\r\t\b\f"\\')


@dataclass(frozen=True, slots=True)
class TextForm:
    """Form of a call whose only argument is a text.

    Attributes:
        before: the text between the call's head and the argument's value.
        after: the text from there to the end of the call.
        closing: what ends a text that stands as it is, which can't hold it; None for one in a JSON string.
    """

    before: str
    after: str
    closing: str | None = None


@lru_cache(maxsize=16)
def lark_input(definition: str, form: TextForm, *, ends_by_token: bool) -> str:
    """The expression of the texts that a caller's grammar allows, as calls of a form hold them.

    In a JSON string a control character that only ``\\u`` spells may come where a string or a regex names it,
    not as one of a class: a model that begins ``\\u00e9`` must not be led to it. Where a text that stands as
    it is may end, what goes on must not read like the beginning of its end, if the closing tag is no token
    and the end begins with it.

    Args:
        ends_by_token: the text behind the argument begins with a special token.

    Raises:
        InvalidRequest: the grammar is malformed, or uses what can't be followed.
    """
    if form.closing is None:
        apart = _ESCAPED
    else:
        apart = frozenset() if ends_by_token else frozenset(form.after[0])
    try:
        return _Writer(_read(definition), apart, form.closing).written()
    except RegexUnread as error:
        raise _refused(f"in one of its regexes {error}") from None
    except RecursionError:
        # Terminals in brackets may hold terminals in brackets.
        raise _refused("its terminals and brackets are nested too deeply together") from None


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar is refused: {reason}.", param="structured")


class _Token(NamedTuple):
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The statements of a grammar.

    Attributes:
        rules, terminals: the tokens of each expression, by name.
        ignored: the expressions of ignored terminals.
    """

    rules: Mapping[str, Sequence[_Token]]
    terminals: Mapping[str, Sequence[_Token]]
    ignored: Sequence[Sequence[_Token]]


def _read(definition: str) -> _Grammar:
    rules: dict[str, Sequence[_Token]] = {}
    terminals: dict[str, Sequence[_Token]] = {}
    ignored = []
    for first, *rest in _statements(definition):
        if first.text == "%ignore":
            ignored.append(rest)
            continue
        if first.text == "%import":
            found = {
                alias: [_Token("regex", f"/{_COMMON[name]}/")]
                for name, alias in _imported(" ".join(token.text for token in rest))
            }
        elif first.kind not in ("rule", "terminal"):
            raise _refused(f"{first.text[:40]} can't begin a statement of it")
        elif not rest or rest[0].text != ":":
            raise _refused(
                f"{first.text[:40]} has no colon behind it; priorities, templates and attributes are not "
                "supported"
            )
        else:
            found = {first.text.lstrip("!?"): rest[1:]}
        for name, tokens in found.items():
            if name in rules or name in terminals:
                raise _refused(f"it defines {name[:60]} twice")
            (terminals if name.lstrip("_")[0].isupper() else rules)[name] = tokens
    if "start" not in rules:
        raise _refused("it has no rule start")
    return _Grammar(rules, terminals, ignored)


def _imported(names: str) -> list[tuple[str, str]]:
    """The terminals that an import names, each with its new name.

    Args:
        names: ``common . NAME``, with ``-> OTHER`` behind it or not, or ``common ( NAME , OTHER )``.
    """
    if one := re.fullmatch(r"common \. (\w+)(?: -> (\w+))?", names):
        wanted = [(one[1], one[2] or one[1])]
    elif many := re.fullmatch(r"common \( (\w+(?: , \w+)*) \)", names):
        wanted = [(name, name) for name in many[1].split(" , ")]
    else:
        raise _refused("it imports other things than terminals of common")
    for name, alias in wanted:
        if name not in _COMMON or not alias.lstrip("_")[:1].isupper():
            raise _refused(f"no terminal {name[:60]} of common can be imported as {alias[:60]}")
    return wanted


def _statements(definition: str) -> Iterator[list[_Token]]:
    """The statements of a grammar. One goes on in lines that begin with ``|``, and within brackets."""
    statement: list[_Token] = []
    depth, ended = 0, False
    for token in _tokens(definition):
        if token.kind == "line":
            ended = depth == 0
            continue
        if ended and token.text != "|" and statement:
            yield statement
            statement = []
        ended = False
        depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
        statement.append(token)
    if statement:
        yield statement


def _tokens(definition: str) -> Iterator[_Token]:
    place = 0
    while place < len(definition):
        found = _TOKEN.match(definition, place)
        if found is None or found.lastgroup is None:
            line = definition.count("\n", 0, place) + 1
            raise _refused(f"its line {line} can't be read from {definition[place : place + 20]!r} on")
        if found.lastgroup != "skip":
            yield _Token(found.lastgroup, found[0])
        place = found.end()


def _text_of(token: str) -> str:
    """The text of a string."""
    inner = token.removesuffix("i")[1:-1]
    if "\\" in _STRING_ESCAPE.sub("", inner):
        raise _refused("one of its strings has an escape that JSON doesn't know")
    spelled = _STRING_ESCAPE.sub(lambda found: f"\\u00{found[1]}" if found[1] else found[0], inner)
    text: str = json.loads(f'"{spelled}"', strict=False)
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise _refused("one of its strings has half of a surrogate pair")
    return text


_T = TypeVar("_T")


@dataclass
class _Build(Generic[_T]):
    """Functions that build an expression from its parts.

    Attributes:
        value: of a name, a string, a regex, or a range, which has an end.
        sequence, choice: of several.
        repeat: of one, with the operator.
    """

    value: Callable[[_Token, _Token | None], _T]
    sequence: Callable[[list[_T]], _T]
    choice: Callable[[list[_T]], _T]
    repeat: Callable[[_T, str], _T]


class _Expression(Generic[_T]):
    """Reads an expression of a rule or a terminal."""

    def __init__(self, tokens: Sequence[_Token], build: _Build[_T]) -> None:
        self._tokens, self._build = [*tokens, _Token("end", "")], build
        self._place = 0

    def read(self) -> _T:
        found = self._choice(0)
        if self._tokens[self._place].kind != "end":
            raise _refused(f"{self._tokens[self._place].text[:40]} can't stand where it does")
        return found

    def _take(self, *texts: str) -> str:
        """The next token, if it is one of ``texts``; else an empty text."""
        found = self._tokens[self._place]
        if found.kind == "mark" and found.text in texts:
            self._place += 1
            return found.text
        return ""

    def _need(self, kind: str) -> str:
        found = self._tokens[self._place]
        if found.kind != kind:
            raise _refused(f"{found.text[:40] or 'the end of a line'} can't stand where it does")
        self._place += 1
        return found.text

    def _choice(self, depth: int) -> _T:
        if depth > _MOST_DEPTH:
            raise _refused("its brackets are nested too deeply")
        options = [self._sequence(depth)]
        while self._take("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else self._build.choice(options)

    def _sequence(self, depth: int) -> _T:
        parts = []
        while (token := self._tokens[self._place]).kind not in ("mark", "end") or token.text in ("(", "["):
            part = self._value(depth)
            operator = self._operator()
            parts.append(self._build.repeat(part, operator) if operator else part)
        if self._take("->"):
            # The name of an alternative says nothing about texts.
            self._need("rule")
        return parts[0] if len(parts) == 1 else self._build.sequence(parts)

    def _value(self, depth: int) -> _T:
        if opening := self._take("(", "["):
            inner = self._choice(depth + 1)
            if not self._take(")" if opening == "(" else "]"):
                raise _refused("it has a bracket without an end")
            return inner if opening == "(" else self._build.repeat(inner, "?")
        token = self._tokens[self._place]
        self._place += 1
        if token.kind not in ("rule", "terminal", "string", "regex"):
            raise _refused(f"{token.text[:40]} can't stand within a statement of it")
        if token.kind == "string" and self._take(".."):
            return self._build.value(token, _Token("string", self._need("string")))
        return self._build.value(token, None)

    def _operator(self) -> str:
        if found := self._take("*", "+", "?"):
            return found
        if self._take("~"):
            low = self._need("number")
            return f"{{{low},{self._need('number') if self._take('..') else low}}}"
        if not self._take("{"):
            return ""
        low = "0" if self._tokens[self._place].text == "," else self._need("number")
        high = low
        if self._take(","):
            high = self._need("number") if self._tokens[self._place].kind == "number" else ""
        if not self._take("}"):
            raise _refused("templates are not supported")
        return f"{{{low},{high}}}"


class _Writer:
    """Writes a grammar in its new form.

    Args:
        apart: the characters that are lexemes of their own.
        closing: of the form.
    """

    def __init__(self, grammar: _Grammar, apart: frozenset[str], closing: str | None) -> None:
        self._grammar, self._apart, self._closing = grammar, apart, closing
        self._barred = "" if closing is None else f" & ~/(.|\\n)*{_slashed(re.escape(closing))}(.|\\n)*/"
        self._not_apart = "[^" + "".join(f"\\x{{{ord(each):X}}}" for each in sorted(apart)) + "]"
        self._lines: list[str] = []
        self._size = 0
        self._nodes: dict[str, Node] = {}
        # Characters of each terminal, with those of the terminals that it holds.
        self._weights: dict[str, int] = {}
        self._open: list[str] = []
        # Names of lexemes and of rules of parts of terminals, by what they are.
        self._lexemes: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._ignored = ""
        self._of_terminals = _Build[Node](
            self._node, lambda parts: Chain(tuple(parts)), lambda parts: Choice(tuple(parts)), Repeat
        )
        self._of_rules = _Build[str](
            self._use,
            lambda parts: " ".join(parts) or '""',
            lambda parts: f"({' | '.join(parts)})",
            lambda part, operator: f"({part}){operator}",
        )

    def written(self) -> str:
        ignored = [_Expression(tokens, self._of_terminals).read() for tokens in self._grammar.ignored]
        if ignored:
            self._add("ignored", f"({' | '.join(self._expression(each) for each in ignored)})*")
            self._ignored = " ignored"
        for name, tokens in self._grammar.rules.items():
            self._add(f"rule_{name}", _Expression(tokens, self._of_rules).read())
        lexemes = [f"{name}: {expression}" for expression, name in self._lexemes.items()]
        return "%lark {\n" + "\n".join(["start: rule_start", *self._lines, *lexemes]) + "\n}"

    def _add(self, name: str, expression: str) -> None:
        self._spend(len(expression))
        self._lines.append(f"{name}: {expression}")

    def _spend(self, characters: int) -> None:
        self._size += characters
        if self._size > _MOST_WRITTEN:
            raise _refused("it is too large when it is written out")

    def _use(self, token: _Token, end: _Token | None) -> str:
        """The expression of a rule, or of a terminal and what is ignored behind it."""
        if token.kind == "rule":
            if token.text not in self._grammar.rules:
                raise _refused(f"it does not define {token.text[:60]}")
            return f"rule_{token.text}"
        expression = self._expression(self._node(token, end))
        return f"({expression}{self._ignored})"

    def _node(self, token: _Token, end: _Token | None) -> Node:
        """The tree of a terminal, a string, a regex or a range."""
        found = self._tree(token, end)
        weight = self._weights.get(token.text, len(token.text))
        self._spend(weight)
        if self._open:
            self._weights[self._open[-1]] += weight
        return found

    def _tree(self, token: _Token, end: _Token | None) -> Node:
        if token.kind == "terminal":
            return self._terminal(token.text)
        if token.kind == "regex":
            pattern, _, flags = token.text[1:].rpartition("/")
            return read_regex(pattern, flags)
        if token.kind == "rule":
            raise _refused(f"one of its terminals holds the rule {token.text[:60]}")
        text = _text_of(token.text)
        if end is not None:
            high = _text_of(end.text)
            if len(text) != 1 or len(high) != 1 or high < text:
                raise _refused("a range is one from a character to a later one")
            return character_range(text, high)
        if self._closing is not None and self._closing in text:
            raise _refused(
                f"{self._closing} ends the call in this model's format, so that no input can hold it"
            )
        parts = [character(each, any_case=token.text.endswith("i")) for each in text]
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def _terminal(self, name: str) -> Node:
        if name not in self._nodes:
            if name not in self._grammar.terminals:
                raise _refused(f"it does not define {name[:60]}")
            if name in self._open or len(self._open) >= _MOST_DEPTH:
                raise _refused(f"its terminal {name[:60]} holds itself, or too many within each other")
            self._open.append(name)
            self._weights[name] = 0
            self._nodes[name] = _Expression(self._grammar.terminals[name], self._of_terminals).read()
            self._open.pop()
        return self._nodes[name]

    def _expression(self, node: Node) -> str:
        """The rule's expression of a terminal, or of a part of one: a rule's name where it is long."""
        expression = self._written_out(node)
        if len(expression) <= _LONG:
            return expression
        if expression not in self._texts:
            self._texts[expression] = f"text_{len(self._texts)}"
            self._add(self._texts[expression], expression)
        return self._texts[expression]

    def _written_out(self, node: Node) -> str:
        if not node.characters & self._apart:
            return self._lexeme(node)
        if isinstance(node, Atom):
            return self._one(node)
        if isinstance(node, Chain):
            return self._in_order(node.parts)
        if isinstance(node, Choice):
            return f"({' | '.join(map(self._expression, node.parts))})"
        return self._repeated(node)

    def _in_order(self, parts: Sequence[Node]) -> str:
        """Parts behind each other: what stands between the characters apart is one lexeme."""
        groups: list[list[Node]] = []
        joins = False
        for part in parts:
            whole = not part.characters & self._apart
            if whole and joins:
                groups[-1].append(part)
            else:
                groups.append([part])
            joins = whole
        found = [group[0] if len(group) == 1 else Chain(tuple(group)) for group in groups]
        written: list[str] = []
        behind: frozenset[str] = frozenset()
        while found:
            part = found.pop()
            if found and self._is_run(part) and not found[-1].characters & self._apart:
                # One lexeme with the run's beginning: else a longer one of another rule could stand against
                # its first part alone.
                before = found.pop()
                written.append(self._repeated(part, before))
                part = Chain((before, part))
            else:
                written.append(self._expression(part))
            self._check_ends(part, behind)
            behind = part.first | behind if part.nullable else part.first
        return " ".join(reversed(written))

    def _is_run(self, node: Node) -> TypeGuard[Repeat]:
        """A repetition of characters, of which some are apart."""
        if not isinstance(node, Repeat) or node.operator not in ("*", "+"):
            return False
        return bool(node.characters & self._apart) and all(isinstance(each, Atom) for each in node.options)

    def _repeated(self, node: Repeat, before: Node | None = None) -> str:
        """The expression of a repetition.

        Args:
            before: what stands before a run, without characters apart. The expression holds it too.
        """
        part, options = node.part, node.options
        if node.operator not in ("*", "+"):
            if node.repeats:
                self._check_ends(part, part.first)
            return f"({self._expression(part)}){node.operator}"
        atoms = [each for each in options if isinstance(each, Atom)]
        plain = frozenset().union(*(each.characters for each in atoms)) - self._apart
        for each in options:
            if not isinstance(each, Atom):
                self._check_ends(each, part.first)
                if plain & each.first:
                    raise self._swallowed()
        # Runs of characters, and what stands between them. Two runs are never side by side: together they
        # could hold what each of them may not.
        texts = [text for each in atoms if (text := self._plain(each))]
        if texts and self._closing is not None and any(each.nullable for each in options):
            raise _refused("one of its terminals repeats a choice that has an empty option; leave that out")
        between = [text for each in atoms for text in self._apart_of(each)]
        between += [self._expression(each) for each in options if not isinstance(each, Atom)]
        if not texts:
            lead = "" if before is None else f"{self._lexeme(before)} "
            return f"{lead}({' | '.join(between)}){node.operator}"
        run = Repeat(Atom(f"(?:{'|'.join(texts)})", plain), "+")
        behind = f"(({' | '.join(between)}) {self._lexeme(run)}?)"
        if node.operator == "*":
            first = (
                f"{self._lexeme(run)}?"
                if before is None
                else self._lexeme(Chain((before, Repeat(run.part, "*"))))
            )
            return f"{first} {behind}*"
        if before is None:
            return f"({self._lexeme(run)} {behind}* | {behind}+)"
        return f"({self._lexeme(Chain((before, run)))} {behind}* | {self._lexeme(before)} {behind}+)"

    def _check_ends(self, part: Node, behind: frozenset[str]) -> None:
        """Refuse a part whose longest lexeme may swallow the beginning of what comes behind it."""
        if part.tail & behind - self._apart:
            raise self._swallowed()

    def _swallowed(self) -> InvalidRequest:
        return _refused(
            "in one of its terminals a repetition may take what comes behind it, which can't be followed in "
            "this model's format of calls; leave the characters that end the repetition out of it"
        )

    def _one(self, atom: Atom) -> str:
        """The expression of one character."""
        plain = self._plain(atom)
        options = [self._lexeme(Atom(plain, frozenset()))] if plain else []
        options += self._apart_of(atom)
        if not options:
            raise _refused("JSON can spell none of the characters of one of its classes")
        return f"({' | '.join(options)})"

    def _plain(self, atom: Atom) -> str:
        """The regex of the characters of an atom that need no lexemes of their own; empty if it has none."""
        apart = atom.characters & self._apart
        if not apart:
            return atom.text
        return _less(atom.text, self._not_apart) if atom.characters - apart else ""

    def _apart_of(self, atom: Atom) -> list[str]:
        """The lexemes of the other characters of an atom."""
        apart = atom.characters & self._apart
        if atom.single is None and self._closing is None:
            apart &= _SHORT
        return [self._spelled(each) for each in sorted(apart)]

    def _spelled(self, text: str) -> str:
        return json.dumps(text if self._closing is not None else json.dumps(text)[1:-1])

    def _lexeme(self, node: Node) -> str:
        """The name of the lexeme of a tree that holds none of the characters apart."""
        if not node.text:
            return '""'
        expression = f"/{_slashed(node.text)}/{self._barred}"
        if expression not in self._lexemes:
            self._spend(len(expression))
            self._lexemes[expression] = f"LEXEME_{len(self._lexemes)}"
        return self._lexemes[expression]


def _less(text: str, others: str) -> str:
    """The regex of a class, or of the point, within ``others``, another class."""
    if text.startswith("(?i:"):
        return f"(?i:{_less(text[4:-1], others)})"
    points = {".": r"[^\n]", "(?s:.)": r"[\s\S]"}
    return f"[{points.get(text, text)}&&{others}]"


def _slashed(pattern: str) -> str:
    """A regex as it stands between slashes."""
    return re.sub(r"\\.|/|\n", lambda found: {"/": "\\/", "\n": "\\n"}.get(found[0], found[0]), pattern)
