"""Grammars of one call's arguments, by the syntax of the family's calls."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from engine.parsers.arguments import (
    arguments_of,
    is_text,
    left_out_of_object,
    others_of,
    resolved,
    standalone,
    text_choices,
    with_bounded_integers,
)
from engine.parsers.free_text import ARGUMENT
from engine.parsers.grammar import CallForm, Rules, ToolSchema
from engine.parsers.lark_input import TextForm
from engine.text_formats import BOUNDED_FORMATS


def json_call(before: str, between: str, after: str) -> CallForm:
    """A call as ``before NAME between ARGUMENTS after``, with the name as JSON text without its quotes."""

    def head(name: str) -> str:
        return before + json.dumps(name, ensure_ascii=False)[1:-1] + between

    def arguments(rules: Rules, tool: ToolSchema, number: int) -> str:
        return f"{embedded(tool.parameters)} {rules.special.literal(after)}".strip()

    return CallForm(head, arguments, TextForm(f'{{"{ARGUMENT}": "', f'"}}{after}'))


#: Calls are written as Python's ``json.dumps`` writes them, which is what chat templates show.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def embedded(schema: Any, layout: Mapping[str, Any] = _SPACING) -> str:
    """A JSON schema as a grammar's expression; see :func:`with_bounded_integers`.

    Args:
        layout: llguidance's options for the text between the parts of JSON.
    """
    # ``True`` is the schema of any value.
    spaced = {"x-guidance": layout} if schema is True else schema
    if isinstance(schema, Mapping):
        spaced = {**with_bounded_integers(schema), "x-guidance": layout}
    return f"%json {json.dumps(spaced, ensure_ascii=False)}"


@dataclass(frozen=True, slots=True)
class _Tags:
    """A tag for each argument, with its name in it.

    Attributes:
        before, behind: the text of the tag around the name.
        end: the text behind a value, which begins or ends with the ``closing`` tag.
        closing: see :func:`tagged_value`.
        after: the text behind all arguments.
        others: a regex of the names of arguments that the schema doesn't name.
    """

    before: str
    behind: str
    end: str
    closing: str
    after: str
    others: str

    def arguments(self, rules: Rules, tool: ToolSchema, number: int) -> str:
        """A tag for each parameter, in the schema's order."""
        rules.left_out.update(left_out_of_object(tool.parameters))
        parts, named = [], arguments_of(tool.parameters)
        for place, (key, each) in enumerate(named.items()):
            tag = rules.special.literal(f"{self.before}{key}{self.behind}")
            name = f"value_{number}_{place}"
            value = tagged_value(rules, tool.parameters, each.schema, name, self.end, self.closing)
            parts.append(f"{tag} {value}" if each.required else f"({tag} {value})?")
        if (others := others_of(tool.parameters)) is not None:
            key = rules.add(f"KEY_{number}", other_key(self.others, named))
            name = f"value_{number}_other"
            value = _other_value(rules, tool.parameters, others, name, self.end, self.closing)
            parts.append(f"({json.dumps(self.before)} {key} {json.dumps(self.behind)} {value})*")
        parts.append(rules.special.literal(self.after))
        return rules.add(f"parameters_{number}", " ".join(parts))

    def form(self, head: Callable[[str], str]) -> CallForm:
        """The form of calls with these tags behind a ``head``."""
        text = TextForm(f"{self.before}{ARGUMENT}{self.behind}", self.end + self.after, self.closing)
        return CallForm(head, self.arguments, text)


def tagged_value(
    rules: Rules, root: Mapping[str, Any], schema: Any, name: str, end: str, closing: str
) -> str:
    """A value as bare text or as JSON, and the text ``end`` behind it.

    Args:
        name: of the rules, which no other value has.
        closing: the tag in ``end``. The parser ends a value at its first appearance, so no text holds it.
    """
    found = resolved(root, schema)
    literal = rules.special.literal
    choices = text_choices(found)
    if choices is not None:
        rules.leave_out(found, *OF_TEXTS, "anyOf", "oneOf", "allOf")
        return f"({' | '.join(literal(choice + end) for choice in choices)})"
    if not is_text(found):
        return f"{embedded(standalone(root, schema))} {literal(end)}"
    tag = _lark_quoted(closing)
    text = rules.add(name.upper(), rf"{_text(rules, found)} & ~/(.|\n)*{tag}(.|\n)*/")
    if closing in rules.special.ids:
        return f"{text} {literal(end)}"
    # The lexeme ends at the first closing tag; a text by itself would go on into it.
    return rules.add(f"{name}[lazy]", f"{text} {json.dumps(end)}")


def _other_value(
    rules: Rules, root: Mapping[str, Any], schema: Any, name: str, end: str, closing: str
) -> str:
    """The value of an argument that the function's schema doesn't name; arguments as :func:`tagged_value`.

    A value of any kind is written as text, without quotes. The parser takes text that is no JSON as a string.
    """
    any_kind = not resolved(root, schema)
    return tagged_value(rules, root, {"type": "string"} if any_kind else schema, name, end, closing)


#: Keywords that bound texts.
OF_TEXTS = ("pattern", "minLength", "maxLength", "format")


def _text(rules: Rules, schema: Mapping[str, Any]) -> str:
    """The terminal of the texts that a schema allows, by pattern, format and length."""
    rules.leave_out(schema, "const", "enum", "anyOf", "oneOf", "allOf")
    patterns = {
        "pattern": schema.get("pattern"),
        # Beside a pattern; prepared schemas have a pattern in place of any other format of these.
        "format": BOUNDED_FORMATS.get(str(schema.get("format"))),
    }
    parts = []
    for key, pattern in patterns.items():
        whole = whole_text(pattern) if isinstance(pattern, str) else None
        if whole is None:
            rules.leave_out(schema, key)
        else:
            parts.append(whole)
    low, high = schema.get("minLength"), schema.get("maxLength")
    if low is not None or high is not None:
        parts.append(rf"(.|\n){{{low or 0},{'' if high is None else high}}}")
    return " & ".join(f"/{part}/" for part in parts or [r"(.|\n)*"])


def other_key(pattern: str, known: Collection[str]) -> str:
    """A terminal for the names of arguments that match ``pattern`` and are none of ``known``."""
    barred = "|".join(map(_lark_quoted, known))
    return f"/{pattern}/ & ~/({barred})/" if known else f"/{pattern}/"


def _lark_quoted(text: str) -> str:
    """The regex of one text, as it stands between the slashes of a Lark grammar."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")


#: An escape, or a class, which may go on to the end. It reads nothing in two ways: callers write patterns,
#: and to try both ways would take exponential time.
_CLASS_OR_ESCAPE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)", re.DOTALL)


def whole_text(pattern: str) -> str | None:
    """A JSON schema's ``pattern`` as a Lark regex of whole texts; None where it has anchors within it."""
    inner = pattern.removeprefix("^").removesuffix("$")
    bare = _CLASS_OR_ESCAPE.sub("", inner)
    anchored = inner != pattern
    if "^" in bare or "$" in bare or pattern.endswith("\\$") or (anchored and _has_alternatives(bare)):
        return None
    before = "" if pattern.startswith("^") else r"(.|\n)*"
    behind = "" if pattern.endswith("$") else r"(.|\n)*"
    return f"{before}({lark_regex(inner)}){behind}"


def _has_alternatives(bare: str) -> bool:
    """Return whether a regex, without its classes and escapes, is a choice at its top level."""
    depth = 0
    for character in bare:
        if character == "|" and depth <= 0:
            return True
        depth += (character == "(") - (character == ")")
    return False


def lark_regex(pattern: str) -> str:
    r"""A regex as it stands between the slashes of a Lark grammar; ``\d`` means the ASCII digits."""
    return llguidance.regex_to_lark(pattern, "d").replace("\n", r"\n")


#: ``<function=NAME>`` with a tag for each parameter (Qwen3-Coder).
XML_CALL = _Tags(
    "<parameter=",
    ">\n",
    "\n</parameter>\n",
    "</parameter>",
    "</function>\n</tool_call>",
    r"[^<>\n ]{1,64}",
).form(lambda name: f"\n<function={name}>\n")

#: ``<atem:invoke name="NAME">`` with a tag for each parameter (Muse Glimmer).
ATEM_CALL = _Tags(
    '<atem:parameter name="',
    '">',
    "</atem:parameter>\n",
    "</atem:parameter>",
    "</atem:invoke>",
    r'[^<>"\n ]{1,64}',
).form(lambda name: f'\n<atem:invoke name="{name}">\n')


def _glm_arguments(rules: Rules, tool: ToolSchema, number: int) -> str:
    """Two pairs of tags for each argument, in the schema's order; the model may put line feeds between."""
    literal, line_feed, end = rules.special.literal, '"\\n"?', "</arg_value>"
    rules.left_out.update(left_out_of_object(tool.parameters))
    parts, named = [], arguments_of(tool.parameters)
    for place, (key, each) in enumerate(named.items()):
        head = f"{literal(f'<arg_key>{key}</arg_key>')} {line_feed} {literal('<arg_value>')}"
        value = tagged_value(rules, tool.parameters, each.schema, f"value_{number}_{place}", end, end)
        part = f"{line_feed} {head} {value}"
        parts.append(part if each.required else f"({part})?")
    if (others := others_of(tool.parameters)) is not None:
        key = rules.add(f"KEY_{number}", other_key(r"[^<>\n]{1,64}", named))
        head = f"{literal('<arg_key>')} {key} {literal('</arg_key>')} {line_feed} {literal('<arg_value>')}"
        value = _other_value(rules, tool.parameters, others, f"value_{number}_other", end, end)
        parts.append(f"({line_feed} {head} {value})*")
    parts.append(f"{line_feed} {literal('</tool_call>')}")
    return rules.add(f"parameters_{number}", " ".join(parts))


#: The name, and a pair of tags for each argument (GLM-4.5 and later).
GLM_CALL = CallForm(
    lambda name: name,
    _glm_arguments,
    TextForm(f"<arg_key>{ARGUMENT}</arg_key><arg_value>", "</arg_value></tool_call>", "</arg_value>"),
)


def _python_arguments(rules: Rules, tool: ToolSchema, number: int) -> str:
    """``key=value, ...)`` with the arguments in the schema's order.

    A key that is no Python name stands in ``**{"key": value}``.
    """
    literal = rules.special.literal
    rules.left_out.update(left_out_of_object(tool.parameters))
    entries, named = [], arguments_of(tool.parameters)
    for key, each in named.items():
        begin, end = f"{key}=", ""
        if not key.isidentifier() or keyword.iskeyword(key):
            begin, end = f"**{{{json.dumps(key, ensure_ascii=False)}: ", literal("}")
        value = f"({_python_value(tool.parameters, each.schema)})"
        entries.append((f"{literal(begin)} {value} {end}".strip(), each.required))
    other = ""
    if (others := others_of(tool.parameters)) is not None:
        barred = [*named, *keyword.kwlist]
        key = rules.add(f"KEY_{number}", other_key("[a-zA-Z_][a-zA-Z0-9_]{0,63}", barred))
        other = f'{key} "=" ({_python_value(tool.parameters, others)})'
    return f"{entries_in_order(rules, f'arguments_{number}', entries, other)} {literal(')')}".strip()


def _python_value(root: Mapping[str, Any], schema: Any) -> str:
    boolean = resolved(root, schema).get("type") == "boolean"
    return '"True" | "False"' if boolean else embedded(standalone(root, schema))


#: ``NAME(key=value, ...)``.
PYTHON_CALL = CallForm(lambda name: f"{name}(", _python_arguments, TextForm(f'{ARGUMENT}="', '")'))


def entries_in_order(
    rules: Rules, name: str, entries: Sequence[tuple[str, bool]], other: str = "", separator: str = ", "
) -> str:
    """Entries, each with whether it is required, with a separator between those that are there.

    Args:
        other: further entries, as many as there are, behind the others; none if empty.
    """
    comma, nothing = json.dumps(separator), json.dumps("")
    # Rules for the entries from ``place`` on: behind another entry, and at the list's beginning.
    following, leading = "", ""
    if other:
        following = rules.add(f"{name}_others", f"({comma} {other})*")
        leading = rules.add(f"{name}_others_first", f"({other} {following})?")
    for place in range(len(entries) - 1, -1, -1):
        entry, required = entries[place]
        behind, first = f"{comma} {entry} {following}".strip(), f"{entry} {following}".strip()
        if not required:
            behind, first = f"{behind} | {following or nothing}", f"{first} | {leading or nothing}"
        following = rules.add(f"{name}_{place}", behind)
        leading = rules.add(f"{name}_{place}_first", first)
    return leading
