"""Formats of tool calls other than JSON between tags."""

import random

import pytest

from engine.parsers.formats import TOOL_FORMATS
from engine.parsers.gemma4 import Gemma4Calls
from engine.parsers.glm import GlmCalls
from engine.parsers.leading_json import LeadingJsonCalls
from engine.parsers.mistral import MistralCalls
from engine.parsers.muse import MuseCalls
from engine.parsers.pythonic import PythonicCalls
from engine.parsers.qwen_xml import QwenXmlCalls
from engine.parsers.tagged import TaggedCalls
from tests.engine.parsers.cuts import parse

SCHEMAS = {
    "report": {
        "type": "object",
        "properties": {
            "color": {"type": "string"},
            "count": {"type": "integer"},
            "tags": {"type": "array"},
            "kind": {"enum": ["a", "b"]},
            'a<"b': {"type": "string"},
        },
    }
}


def check(make, text, visible, calls):
    found = parse(make, text)
    assert found["text"] == visible
    assert found["calls"] == calls


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "arguments": {"y": 2}}',
            "",
            [("f", "{}"), ("g", '{"y": 2}')],
        ),
        (
            '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        ('  {"name": "f", "parameters": {"a": "b', "", [("f", '{"a": "b')]),
        # An answer in JSON is no call, and a call in the middle of a text isn't one either.
        ('{"color": "red"}', '{"color": "red"}', []),
        ("[1, 2]", "[1, 2]", []),
        ('Sure: {"name": "f", "parameters": {}}', 'Sure: {"name": "f", "parameters": {}}', []),
        ("Hello", "Hello", []),
        ('{"name": "f"', "", [("f", "")]),
        ("  ", "  ", []),
    ],
)
def test_llama(text, visible, calls):
    check(LeadingJsonCalls, text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
        (
            'Wait. [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": "]"}}]',
            "Wait.",
            [("f", "{}"), ("g", '{"a": "]"}')],
        ),
        ('[TOOL_CALLS]f[ARGS]{"x": {"y": "}"}}', "", [("f", '{"x": {"y": "}"}}')]),
        (
            '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"a": 1}',
            "",
            [("f", "{}"), ("g", '{"a": 1}')],
        ),
        ('[TOOL_CALLS]f{"x": 1}', "", [("f", '{"x": 1}')]),
        ("[TOOL", "[TOOL", []),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ("a list [1] and [TOOL_CALLS", "a list [1] and [TOOL_CALLS", []),
    ],
)
def test_mistral(text, visible, calls):
    check(MistralCalls, text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            "<tool_call>\n<function=report>\n<parameter=color>\nred\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            [("report", '{"color": "red", "count": 3}')],
        ),
        # A string stays one whatever it looks like; an unknown type is JSON if it can be.
        (
            "ok <function=report><parameter=color>3</parameter><parameter=kind>1</parameter>"
            '<parameter=tags>["a", "<b>"]</parameter><parameter=other>tr"ue</parameter></function> done',
            "ok done",
            [("report", '{"color": "3", "kind": "1", "tags": ["a", "<b>"], "other": "tr\\"ue"}')],
        ),
        (
            "<tool_call><function=f></function></tool_call>\n<tool_call><function=g></function>",
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            "<tool_call>\n<function=f>\n<parameter=a>\nline 1\n\nline 2\n</parameter>\n</tool_call>",
            "",
            [("f", '{"a": "line 1\\n\\nline 2"}')],
        ),
        ("a <tool_call> b", "a <tool_call> b", []),
        ("<function", "<function", []),
        ("<tool_call><function=f><parameter=a>1</parameter><parameter=b>x", "", [("f", '{"a": 1')]),
        (
            '<tool_call><function=report><parameter=color>\ndark "red\n</para',
            "",
            [("report", '{"color": "dark \\"red')],
        ),
        ("<tool_call><function=report><parameter=count>\n12", "", [("report", '{"count": 12')]),
        ("<tool_call><function=f></function>\n</tool_c", "", [("f", "{}")]),
        ("<tool_call><function=f></function>\nso <", "so <", [("f", "{}")]),
    ],
)
def test_qwen_xml(text, visible, calls):
    check(lambda: QwenXmlCalls(SCHEMAS), text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            "I look.\n<tool_call>report\n<arg_key>color</arg_key>\n<arg_value>red</arg_value>\n"
            "<arg_key>count</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            "I look.",
            [("report", '{"color": "red", "count": 3}')],
        ),
        # Newer templates write no line feeds. Strings stay strings; an unknown key's value may be JSON.
        (
            "<tool_call>report<arg_key>color</arg_key><arg_value>3</arg_value><arg_key>tags</arg_key>"
            '<arg_value>["a", "<b>"]</arg_value><arg_key>other</arg_key><arg_value>tr"ue</arg_value>'
            "</tool_call>",
            "",
            [("report", '{"color": "3", "tags": ["a", "<b>"], "other": "tr\\"ue"}')],
        ),
        (
            "<tool_call>f\n</tool_call>\n"
            "<tool_call>g <arg_key>a</arg_key> <arg_value>1</arg_value> </tool_call> so",
            "so",
            [("f", "{}"), ("g", '{"a": 1}')],
        ),
        ("look\n<tool_call>f</tool_call>\nso", "look\nso", [("f", "{}")]),
        (
            "<tool_call>report<arg_key>color</arg_key><arg_value> a\n\nb </arg_value></tool_call>",
            "",
            [("report", '{"color": " a\\n\\nb "}')],
        ),
        ("a <tool_call> b", "a <tool_call> b", []),
        ("<tool_call>f", "<tool_call>f", []),
        ("<tool_call><arg_key>", "<tool_call><arg_key>", []),
        ('<tool_call>{"name": "f"} </tool', '<tool_call>{"name": "f"} </tool', []),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>x",
            "",
            [("f", '{"a": 1')],
        ),
        (
            '<tool_call>report<arg_key>color</arg_key><arg_value>dark "red</arg',
            "",
            [("report", '{"color": "dark \\"red')],
        ),
    ],
)
def test_glm(text, visible, calls):
    check(lambda: GlmCalls(SCHEMAS), text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", '{"x": 1}'), ("g", "{}")],
        ),
        ("a list [1] and <|tool_call", "a list [1] and <|tool_call", []),
        ("<|tool_call|>", "<|tool_call|>", []),
    ],
)
def test_granite(text, visible, calls):
    check(lambda: MistralCalls("<|tool_call|>"), text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ("[f(a=1, b='x')]", "", [("f", '{"a": 1, "b": "x"}')]),
        (
            '[f(), g(a=[1, (2, 3)], b={"k": None}, c=True)]',
            "",
            [("f", "{}"), ("g", '{"a": [1, [2, 3]], "b": {"k": null}, "c": true}')],
        ),
        ("[a.b(x=-1.5)]", "", [("a.b", '{"x": -1.5}')]),
        ("[f(a='it\\'s (fine)]')]", "", [("f", '{"a": "it\'s (fine)]"}')]),
        ("[f(a=true, b=null)]", "", [("f", '{"a": true, "b": null}')]),
        # Not calls: nothing is evaluated, positional values have no name.
        ("[1, 2]", "[1, 2]", []),
        ("[Note] see below", "[Note] see below", []),
        ("[f(1)]", "[f(1)]", []),
        ("[f(a=open('x'))]", "[f(a=open('x'))]", []),
        ("[f(a=-1e999)]", "", [("f", '{"a": -1.7976931348623157e+308}')]),
        (r'[f(a="\ud83d\ude00")]', "", [("f", '{"a": "😀"}')]),
        # A call that is cut off has the arguments that are whole.
        ("[f", "[f", []),
        ("[f(a=", "", [("f", "{")]),
        ("[f(a=[1, 2], b='x, y", "", [("f", '{"a": [1, 2]')]),
        ("[f(a=1), g(b=2, c", "", [("f", '{"a": 1}'), ("g", '{"b": 2')]),
        ("f(a=1)", "f(a=1)", []),
        ("[f(a=1), oops", "", [("f", '{"a": 1}')]),
    ],
)
def test_pythonic(text, visible, calls):
    check(PythonicCalls, text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            "I look.\n<|tool_call_start|>\n```python\nf(a=1)\ng(b='```')\n```\n<|tool_call_end|>\nDone.",
            "I look.\nDone.",
            [("f", '{"a": 1}'), ("g", '{"b": "```"}')],
        ),
        ("<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>", "", [("f", '{"a": 1}'), ("g", "{}")]),
        ("<|tool_call_start|>oops<|tool_call_end|>", "<|tool_call_start|>oops<|tool_call_end|>", []),
        ("a <|tool", "a <|tool", []),
    ],
)
def test_pythonic_between_tags(text, visible, calls):
    check(lambda: PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>"), text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            'I look.\n<|tool_call>call:f{a:1,b:<|"|>say "hi", {you}:\n[1]<|"|>,'
            'c:{d:[1,2.5e3,<|"|>q<|"|>,[],{}],e-f g:None},h:true}<tool_call|>',
            "I look.",
            [
                (
                    "f",
                    '{"a": 1, "b": "say \\"hi\\", {you}:\\n[1]", '
                    '"c": {"d": [1, 2.5e3, "q", [], {}], "e-f g": null}, "h": true}',
                )
            ],
        ),
        (
            '<|tool_call>call:f{}<tool_call|><|tool_call>call:g-1.x{a:<|"|><|"|>}<tool_call|>\nso',
            "so",
            [("f", "{}"), ("g-1.x", '{"a": ""}')],
        ),
        # Tags within a text, words that are no JSON, JSON's own strings, and white space.
        (
            '<|tool_call>call:f{a:<|"|><tool_call|>}<|"|>,b:New York,c:NaN,d:01}<tool_call|>',
            "",
            [("f", '{"a": "<tool_call|>}", "b": "New York", "c": "NaN", "d": "01"}')],
        ),
        (
            '<|tool_call> call: f { "a" : "b\\"c" , <|"|>k:1<|"|> : [ 1 , 2 , ] , } <tool_call|>',
            "",
            [("f", '{"a": "b\\"c", "k:1": [1, 2]}')],
        ),
        # Cut off, and broken.
        ("<|tool_call>call:f{a:12", "", [("f", '{"a": 12')]),
        ('<|tool_call>call:f{a:1,b:<|"|>dark "red<|"', "", [("f", '{"a": 1, "b": "dark \\"red')]),
        ("<|tool_call>call:f{a:1,b", "", [("f", '{"a": 1')]),
        ("<|tool_call>call:f{a:[1}<tool_call|>so", "so", [("f", '{"a": [1')]),
        ("<|tool_call>call:f{a:}<tool_call|>so", "so", [("f", "{")]),
        ("<|tool_call>call:f{a:1} so", "so", [("f", '{"a": 1}')]),
        ("<|tool_call>f{a:1}", "<|tool_call>f{a:1}", []),
        ("<|tool_call>call:f", "<|tool_call>call:f", []),
        ("a <|tool", "a <|tool", []),
    ],
)
def test_gemma4(text, visible, calls):
    check(Gemma4Calls, text, visible, calls)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            'So.<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"x": 1}},\n'
            '    {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]<|END_ACTION|>',
            "So.",
            [("f", '{"x": 1}'), ("g", "{}")],
        ),
        ('<|START_ACTION|>[{"name": "f"}]', '<|START_ACTION|>[{"name": "f"}]', []),
        ("a list [1] and <|START_ACTION", "a list [1] and <|START_ACTION", []),
        ('<|START_ACTION|>[{"tool_name": "f", "parameters": {"x": 1', "", [("f", '{"x": 1')]),
    ],
)
def test_cohere(text, visible, calls):
    check(lambda: TOOL_FORMATS["cohere"].parser({}), text, visible, calls)


_ATEM = "<atem:function_calls>\n{}\n</atem:function_calls>"
_INVOKED = _ATEM.format('<atem:invoke name="f">\n<atem:parameter name="x">1</atem:parameter>\n</atem:invoke>')
_OPEN = 'to=f<|message|><atem:function_calls><atem:invoke name="report">'
_SAID = "<|start|>assistant to=user<|message|>Done."
_NEXT = f"<|eom|>{_SAID}"
_DARK = '<atem:parameter name="color"> dark\n"red"</atem:parameter>'


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        (
            " to=self<|message|>Hm.<|eom|><|start|>assistant to=f<|message|>\n" + _INVOKED + "<|eom|>"
            "<|start|>assistant to=user<|message|>Done.",
            " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Done.",
            [("f", '{"x": 1}')],
        ),
        (f" to=f<|message|>{_INVOKED}", "", [("f", '{"x": 1}')]),
        (_INVOKED, "", [("f", '{"x": 1}')]),
        (
            _ATEM.format(
                f'<atem:invoke name="report.report">{_DARK}</atem:invoke>'
                '<atem:invoke name="a.b"></atem:invoke>'
            )
            + "<|eom|>",
            "",
            [("report", '{"color": " dark\\n\\"red\\""}'), ("a.b", "{}")],
        ),
        # Calls that a thought or a text quotes are text.
        (f" to=self<|message|>So {_INVOKED}", f" to=self<|message|>So {_INVOKED}", []),
        (f" to=user<|message|>{_INVOKED}", f" to=user<|message|>{_INVOKED}", []),
        # One that is to nobody makes calls.
        (f"Say {_INVOKED} So.", "Say  So.", [("f", '{"x": 1}')]),
        ("a <|start|> b", "a <|start|> b", []),
        ("<|start|>assistant to=", "<|start|>assistant to=", []),
        ("to be", "to be", []),
        (" to=f", " to=f", []),
        (
            'to=f<|message|><atem:function_calls><atem:invoke name="report">'
            '<atem:parameter name="color">dark </at',
            "",
            [("report", '{"color": "dark ')],
        ),
        ("to=f<|message|>I call it.<|eom|>", "", []),
        # The end of a message ends what is open in it: a value, also one that is no JSON, and a tag.
        (_OPEN + '<atem:parameter name="count">1' + _NEXT, _SAID, [("report", '{"count": 1}')]),
        (
            _OPEN + '<atem:parameter name="tags">[1, <|start|>b',
            "<|start|>b",
            [("report", '{"tags": "[1, "}')],
        ),
        (_OPEN + '<atem:parameter name="count' + _NEXT, _SAID, [("report", "{}")]),
        (_OPEN + '<atem:parameter name="co"unt">' + _NEXT, _SAID, [("report", "{}")]),
        ('to=f<|message|><atem:invoke name="report"' + _NEXT, _SAID, []),
        (
            _OPEN + '<atem:parameter name="color>dark</atem:parameter><atem:parameter name="count">1'
            '</atem:parameter><atem:invoke name="f">' + _NEXT,
            _SAID,
            [("report", '{"count": 1}'), ("f", "{}")],
        ),
        (_OPEN + '<atem:parameter name="a<"b">x</atem:parameter>', "", [("report", '{"a<\\"b": "x"')]),
    ],
)
def test_muse(text, visible, calls):
    check(lambda: MuseCalls(SCHEMAS), text, visible, calls)


FORMATS = {
    "muse": lambda: MuseCalls(SCHEMAS),
    "gemma4": Gemma4Calls,
    "tagged": lambda: TaggedCalls(("<tool_call>",), "</tool_call>"),
    "llama": LeadingJsonCalls,
    "mistral": MistralCalls,
    "granite": lambda: MistralCalls("<|tool_call|>"),
    "cohere": lambda: TOOL_FORMATS["cohere"].parser({}),
    "glm": lambda: GlmCalls(SCHEMAS),
    "qwen_xml": lambda: QwenXmlCalls(SCHEMAS),
    "pythonic": PythonicCalls,
    "pythonic between tags": lambda: PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>"),
}

#: Pieces of all formats, to be put together at random.
PIECES = [
    "<tool_call>", "</tool_call>", "<function=report>", "</function>", "<parameter=color>",
    "</parameter>", "<arg_key>color</arg_key>", "<arg_value>", "</arg_value>", "report", "<|tool_call|>",
    "<|START_ACTION|>", '{"tool_name": "f", "parameters": ', "<|END_ACTION|>",
    "[TOOL_CALLS]", "[ARGS]", "<|tool_call_start|>", "<|tool_call_end|>", "<|python_tag|>",
    "```", "```python\n", '{"name": "f", "arguments": ', '{"a": 1}', '{"name": "g"', "}", "{", "[", "]",
    "<|start|>assistant", " to=f", " to=user", "<|message|>", "<|eom|>", "<atem:function_calls>",
    '<atem:invoke name="report">', '<atem:parameter name="color">', "</atem:parameter>", "</atem:invoke>",
    '<atem:parameter name="', '">',
    "<|tool_call>", "call:f{", "a:", '<|"|>', "<tool_call|>",
    "f(a=1)", "f(", ")", "'", '"', "\\", "\n", " ", ",", "text", "1", ":", "=", "<", "ü😀",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_any_text_gives_the_same_for_every_cut(name):
    rng = random.Random(name)
    for _ in range(150):
        parse(FORMATS[name], "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 9))))
