"""Callers' Lark grammars within calls. The reference is llguidance with the same grammar by itself."""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

import llguidance
import pytest

from engine.errors import InvalidRequest
from engine.parsers.call_forms import XML_CALL, json_call
from engine.parsers.grammar import CallLayout, SpecialTokens, ToolSchema, tool_grammar
from engine.parsers.lark_input import lark_input
from tests.engine.parsers.test_grammar import Vocabulary

FORMS = {"json": json_call("", "", "").text, "line": XML_CALL.text}

PATCH = r"""
start: begin hunk+ end
begin: "*** Begin Patch" LF   // a comment "
end: "*** End Patch" LF?      # another /
?hunk: add | remove -> gone
     | change

add: "*** Add File: " name LF added+
remove: "*** Delete File: " name LF
change: "*** Update File: " name LF ("@@" LF? line)+
name: /(.+)/
added: "+" /(.*)/ LF -> line
line: ("+" | "-" | " ") /(.*)/ LF
%import common.LF
"""
SUM = """
start: term (SP PLUS SP term)* -> sum
term: factor (SP "*" SP factor)*
factor: INT | "(" start ")"
SP: " "
PLUS: "+"
%import common.INT
"""
PAIRS = r"""
start: pair (";" pair)*
pair: NAME "=" (ESCAPED_STRING | NUMBER | "on"i | "a".."f" | list)
list: "[" [NUMBER ("," NUMBER)~1..2] "]"
NAME: LETTER ("_" | LETTER){0,3}
%import common (WS, ESCAPED_STRING, LETTER)
%import common.SIGNED_NUMBER -> NUMBER
%ignore WS
%ignore /#[^\n]*/
"""
CODE = r"""
start: (LINE NEWLINE)* LINE
LINE: "\t"? (WORD | QUOTED) "\\"?
WORD: /[\w&&[^\d]]+/
QUOTED: /"(?:[^"\\\n]|\\["\\n])*"|'[[:^punct:]\/]{2}'/
%import common.NEWLINE
"""
ANY = r'start: "<" /(.|\n)*/'

TEXTS = {
    PATCH: (
        "*** Begin Patch\n*** Add File: a.py\n+x = \"é\\n\"\n+\n*** Delete File: \tb\n*** End Patch",
        "*** Begin Patch\n*** Update File: a\n@@\n-<b>\\\n@@+</p>\n*** End Patch\n",
    ),
    SUM: ("4 + 4 * (12 + 3)", "7"),
    PAIRS: ('ab = "x\\"\\\\y";\n c=-1.5e3 # "why" \\\n;d=ON;e=c; f=[1, 2,3];\tg_h=[]', "a=\n\n[ ]"),
    CODE: ('\té\nab\r\n"say \\"\\\\ no"\\\n\n\'a/\'', "x", "\t'é '\\\nyz"),
    ANY: ("<a\n\n\"b\"\\ \tc\n", "<", "<\\n😀"),
}  # fmt: skip
CASES = [(definition, text) for definition, texts in TEXTS.items() for text in texts]


@cache
def words() -> Vocabulary:
    return Vocabulary("text")


def in_call(definition: str, form: str) -> str:
    """The grammar of all that follows a call's head."""
    found = FORMS[form]
    text = lark_input(definition, found, ends_by_token=False)
    return f"start: {json.dumps(found.before)} {text} {json.dumps(found.after)}"


@cache
def matcher(definition: str, form: str | None) -> llguidance.LLMatcher:
    made = llguidance.LLMatcher(
        words().engine, in_call(definition, form) if form else definition, log_level=0
    )
    assert not made.is_error(), made.get_error()
    return made


def allowed(definition: str, text: str, form: str | None = None) -> bool:
    if form is not None:
        found = FORMS[form]
        held = json.dumps(text, ensure_ascii=False)[1:-1] if found.closing is None else text
        text = found.before + held + found.after
    copy, tokens = matcher(definition, form).deep_copy(), words().encode(text)
    return copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting()


@pytest.mark.parametrize("form", ["json", "line"])
@pytest.mark.parametrize(("definition", "text"), CASES, ids=range(len(CASES)))
def test_calls_hold_what_the_grammar_allows_by_itself(definition, text, form):
    assert allowed(definition, text) and allowed(definition, text, form)
    draw = random.Random(text)
    for _ in range(40):
        place, more = (
            draw.randrange(len(text) + 1),
            draw.choice(["", "\n", '"', "\\", " ", "a", "+", ";", "é"]),
        )
        edited = text[:place] + more + text[place + draw.choice([0, 1, 1, 3]) :]
        assert allowed(definition, edited, form) == allowed(definition, edited), edited


@pytest.mark.parametrize("form", ["json", "line"])
@pytest.mark.parametrize("definition", [SUM, PAIRS, CODE, ANY], ids=["sum", "pairs", "code", "any"])
def test_what_a_model_may_write_follows_the_grammar(definition, form):
    found = FORMS[form]
    finished = 0
    for seed in range(8):
        written = words().walk(in_call(definition, form), seed, limit=300)
        if not written.finished or "\ufffd" in written.text:
            continue
        finished += 1
        text = written.text.removeprefix(found.before).removesuffix(found.after)
        assert allowed(definition, json.loads(f'"{text}"') if form == "json" else text), text
    assert finished


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("", "no rule start"),
        ("begin: /a/", "no rule start"),
        ("start: a", "does not define a"),
        ("start: A", "does not define A"),
        ('start: A\nA: "a" A', "holds itself"),
        ('start: A\nA: b\nb: "b"', "holds the rule b"),
        ('start: "a"\nstart: "b"', "defines start twice"),
        ('start: "a', "line 1 can't be read"),
        ('start: "\\q"', "escape"),
        ('start: "\\ud800"', "surrogate"),
        ('start: ("a"', "bracket without an end"),
        ('start: "a")', ") can't stand"),
        ("start: | *", "* can't stand"),
        ('start: "a" ~ x', "x can't stand"),
        ('start: A\nA.2: "a"', "priorities"),
        ('start[lazy]: "a"', "attributes"),
        ("start: <think>", "can't be read from '<think>'"),
        ("start: @other", "can't be read"),
        ("start: %json {}", "%json can't stand"),
        ('%llguidance {}\nstart: "a"', "%llguidance can't begin"),
        ("%import other.A\nstart: A", "imports other things"),
        ("%import common.A\nstart: A", "no terminal A of common"),
        ("%import common.WS -> ws\nstart: ws", "imported as ws"),
        ('start: "b".."a"', "from a character to a later one"),
        ("start: /a(?=b)/", "look-around"),
        ("start: /^a$/", "anchors"),
        (r"start: /a\b/", "escape"),
        ("start: /a+?/", "lazy"),
        ("start: /(a/", "group without an end"),
        ("start: /a)/", "not opened"),
        ("start: /[a/", "class without an end"),
        ("start: /[z-a]/", "range without an order"),
        ("start: /[[:other:]]/", "unknown"),
        (r"start: /\p{Other}/", "property"),
        (r"start: /\x{110000}/", "no character"),
        ("start: /a/x", "flag x"),
        (f"start: {'(' * 40}", "nested too deeply"),
        (f"start: /{'(' * 40}/", "nested too deeply"),
        (f"start: /{'[' * 40}/", "nested too deeply"),
        ("start: A40\nA0: /a/\n" + "\n".join(f"A{i + 1}: A{i}" for i in range(40)), "within each other"),
        ('start: A20\nA0: "\\n"\n' + "\n".join(f"A{i + 1}: A{i} A{i}" for i in range(20)), "too large"),
        ("start: A20\nA0: /a/\n" + "\n".join(f"A{i + 1}: A{i} A{i}" for i in range(20)), "too large"),
        (
            "start: A31\nA0: /a/\n" + "\n".join(f"A{i + 1}: {'(' * 28}A{i}{')' * 28}" for i in range(31)),
            "terminals and brackets are nested too deeply",
        ),
        (r"start: /.*a\n/", "may take what comes behind"),
        (r"start: /([^b]|ab\n?)*/", "may take what comes behind"),
        (r"start: /a+[ab]([^a]b)+/", "may take what comes behind"),
        (r"start: /(a(ab)?)+[^a]/", "may take what comes behind"),
        (r"start: /(\n|a?){2}/", "may take what comes behind"),
        (r"start: /([^\n]|\n?)*/", "has an empty option"),
        (r"start: /(;|(\n,)?)+/", "has an empty option"),
        ("start: /a{x/", "{ stands where"),
        ("start: /a{,2}/", "{ stands where"),
        ('start: /[&&"]/', "begin with &&"),
        ('start: /[^~~"]/', "begin with &&"),
    ],
    ids=itertools.count(),
)
def test_what_cannot_be_followed_is_refused(definition, message):
    with pytest.raises(InvalidRequest, match="^The grammar is refused: .*" + re.escape(message)) as refused:
        in_call(definition, "json")
        in_call(definition, "line")
    assert refused.value.param == "structured"


@pytest.mark.parametrize("form", ["json", "line"])
def test_nested_repetitions_do_not_double_each_other(form):
    def nested(depth: int) -> str:
        inner = "b"
        for _ in range(depth):
            inner = rf"(a|\n{inner};)+"
        return inner

    definition, pattern = f"start: /{nested(3)}/", re.compile(nested(3))
    for text in ("a", "aa", "\n\nb;;", "\n\n\nb;;;", "a\naa\nb;a;a", "\n\n\nb;;a\na;;", "\n"):
        assert allowed(definition, text, form) == (pattern.fullmatch(text) is not None), text
    sizes = [len(in_call(f"start: /{nested(depth)}/", form)) for depth in (8, 16, 24)]
    assert sizes[2] - sizes[1] < 2 * (sizes[1] - sizes[0])


def test_options_in_a_row_take_linear_work():
    def lines_run(count: int) -> int:
        """Lines of code that ran."""
        ran = 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal ran
            ran += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            lark_input.__wrapped__("start: /" + r"\n?" * count + "/", FORMS["json"], ends_by_token=False)
        finally:
            sys.settrace(before)
        return ran

    assert lines_run(400) < 2.5 * lines_run(200)


LINES = """
start: (LINE "\\n")* "end"
LINE: /[a-z].*/
"""
NOTES = """
start: (COLOR | NOTE) "\\n"
COLOR: /#[0-9a-f]{6}/
NOTE: /#.+/
"""


@pytest.mark.parametrize("form", ["json", "line"])
@pytest.mark.parametrize(
    ("definition", "text"),
    [
        *((LINES, text) for text in ("entry\nend", "e\\\nend", 'en"d\nending\nend', "ending", "\nend")),
        *((NOTES, text) for text in ("#abcdef\n", "#abcdef0\n", "#abc\n", '#"\n', '#a"\n', "#\n")),
        *((r"start: /[a-z]+.*/ /\n/", text) for text in ("ab, c\n", 'a"b\n', "\n", "1\n")),
        *((r"start: /[--a]x/", text) for text in ("-x", "ax", "0x", "\\x")),
        *((r"start: /[^--a]x/", text) for text in ("-x", "ax", "0x", "\\x", '"x')),
        *((r"start: /[-\]]/", text) for text in ("-", "]", "\\")),
        (r"start: /[a\x03]+/", "aa"),
    ],
    ids=itertools.count(),
)
def test_parts_of_a_terminal_are_not_taken_for_others(definition, text, form):
    assert allowed(definition, text, form) == allowed(definition, text)


REPEATED = ("a", "b", "[ab]", "[^a]", r"\n", '"', r"\\")


@pytest.mark.parametrize("form", ["json", "line"])
def test_an_expression_of_its_own_means_the_same_in_a_call(form):
    """A part with a count, and parts that end at several places, are followed or refused."""
    draw, texts = random.Random(5), ["".join(text) for text in itertools.product('ab\n"', repeat=3)]
    followed = 0
    for _ in range(60):
        one, two, three = (draw.choice(REPEATED) + draw.choice(["", "*", "+", "?", "{2}"]) for _ in range(3))
        pattern = f"({one}{two}){draw.choice(['*', '?', '{2}', '{1,2}'])}{three}"
        try:
            in_call(f"start: /{pattern}/", form)
        except InvalidRequest:
            continue
        followed += 1
        for text in texts:
            expected = re.fullmatch(pattern, text) is not None
            assert allowed(f"start: /{pattern}/", text, form) == expected, (pattern, text)
    assert followed > 20


def test_what_may_end_a_text_in_tags_may_stand_in_it():
    """A line may begin like the call's end."""
    tool = ToolSchema("note", {}, r"start: /(.|\n)+/")
    grammar = tool_grammar(
        CallLayout("", XML_CALL), [tool], SpecialTokens({}, frozenset()), choice="required", parallel=False
    )
    made = llguidance.LLMatcher(words().engine, grammar, log_level=0)
    for text, is_allowed in (("a\n<b>\nc", True), ("\n</parameter\n\n", True), ("a\n</parameter>\nb", False)):
        call = f"\n<function=note>\n<parameter=input>\n{text}\n</parameter>\n</function>\n</tool_call>"
        copy, tokens = made.deep_copy(), words().encode(call)
        accepted = copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting()
        assert accepted == is_allowed, text


def test_an_input_that_would_end_the_call_is_barred():
    with pytest.raises(InvalidRequest, match="</parameter> ends the call"):
        in_call('start: "</parameter>"', "line")
    assert allowed('start: "</parameter>"', "</parameter>", "json")
    assert allowed(ANY, "<</parameter>") and not allowed(ANY, "<</parameter>", "line")
    assert allowed(ANY, "<</parameter", "line")


def test_control_characters_come_where_they_are_named():
    assert allowed(r'start: "\u0001" /\x02[\n\x03]/', "\x01\x02\n", "json")
    assert not allowed(r"start: /[\n\x03]/", "\x03", "json")
    with pytest.raises(InvalidRequest, match="none of the characters"):
        in_call(r"start: /[\x01-\x03]/", "json")
