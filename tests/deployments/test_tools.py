"""Tools and thoughts of a request: what is refused, and what constrains the answer."""

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from deployments.answer_format import AnswerFormat, answer_format
from deployments.answers import AnswerReader, FinishedChoice, gather
from deployments.errors import UnsupportedParameter
from deployments.tools import (
    NO_TOOLS,
    names_in_namespaces,
    read_flat_tools,
    read_functions,
    read_tools,
)
from engine.errors import InvalidRequest, SightlineError
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.parsers.events import CallArguments, Reasoning
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS
from engine.parsers.grammar import SpecialTokens
from engine.sampling_params import MAX_REGEX_LENGTH, StructuredSpec
from engine.text_formats import BOUNDED_FORMATS
from tests.engine.parsers.cuts import joined
from tests.engine.parsers.test_grammar import Vocabulary

SPECIAL = SpecialTokens({"<tool_call>": 7, "</tool_call>": 8, "<think>": 9, "</think>": 10}, frozenset([1]))
HERMES = AnswerFormat(SPECIAL, TOOL_FORMATS["hermes"], REASONING_TAGS["think"])
REPORT = {"name": "report", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": REPORT}, {"type": "function", "function": {"name": "stop"}}]


FORMAT = "tools[0].custom.format.grammar"


def custom(name: str, **grammar) -> dict:
    form = {"format": {"type": "grammar", "grammar": grammar}} if grammar else {}
    return {"type": "custom", "custom": {"name": name, **form}}


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ("report", None, "tools"),
        ([5], None, "tools[0]"),
        ([{"type": "function"}], None, "tools[0].function"),
        ([{"type": "function", "function": {"name": "no spaces"}}], None, "tools[0].function.name"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            None,
            "tools[0].function.parameters",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
            None,
            "tools[0].function.parameters",
        ),
        (
            [{"type": "function", "function": {"name": "f", "description": 5}}],
            None,
            "tools[0].function.description",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}],
            None,
            "tools[0].function.parameters.properties",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"required": 5}}}],
            None,
            "tools[0].function.parameters.required",
        ),
        ([TOOLS[0], TOOLS[0]], None, "tools[1].function.name"),
        ([TOOLS[0], {"type": "custom", "custom": {"name": "report"}}], None, "tools[1].custom.name"),
        ([{"type": "custom"}], None, "tools[0].custom"),
        ([{"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}], None, FORMAT),
        ([custom("f", syntax="regex")], None, f"{FORMAT}.definition"),
        ([custom("f", syntax="lark")], None, f"{FORMAT}.definition"),
        ([custom("f", syntax="ebnf", definition="x")], None, f"{FORMAT}.syntax"),
        ([custom("f", syntax="regex", definition="(a|^b)")], None, f"{FORMAT}.definition"),
        ([custom("f", syntax="regex", definition="a$b")], None, f"{FORMAT}.definition"),
        ([custom("f", syntax="regex", definition="a)|(b")], None, f"{FORMAT}.definition"),
        (
            [custom("f", syntax="regex", definition="a" * (MAX_REGEX_LENGTH + 1))],
            None,
            f"{FORMAT}.definition",
        ),
        ([custom("f")], {"type": "custom", "custom": {"name": "g"}}, "tool_choice.custom.name"),
        (TOOLS * 65, None, "tools"),
        (TOOLS, "sometimes", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "tool_choice.function.name"),
        (
            TOOLS,
            {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "other"}]},
            "tool_choice.tools[0].name",
        ),
        (None, "required", "tool_choice"),
    ],
)
def test_what_is_refused(tools, choice, param):
    with pytest.raises(SightlineError) as refused:
        read_tools(tools, choice, None)
    assert refused.value.param == param


def test_tools_that_run_on_the_server_are_not_offered():
    with pytest.raises(UnsupportedParameter, match="only functions") as refused:
        read_tools([{"type": "web_search"}], None, None)
    assert refused.value.param == "tools[0].type"


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools(tools):
    assert read_tools(tools, None, None) == NO_TOOLS == read_tools(tools, "none", True)


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        (None, "auto", {"report", "stop"}),
        ("auto", "auto", {"report", "stop"}),
        ("none", "none", {"report", "stop"}),
        ("required", "required", {"report", "stop"}),
        ({"type": "function", "function": {"name": "stop"}}, "required", {"stop"}),
        ({"type": "function", "name": "stop"}, "required", {"stop"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"name": "report"}]}},
            "required",
            {"report"},
        ),
    ],
)
def test_choices(choice, mode, names):
    use = read_tools(TOOLS, choice, None)
    assert use.choice == mode
    assert {tool.name for tool in use.callable(TOOL_FORMATS["hermes"].layout.form, SPECIAL)} == names


def test_functions_are_tools_of_an_older_form():
    use = read_functions([REPORT], {"name": "report"})
    assert (use.choice, use.parallel) == ("required", False)
    assert read_functions([REPORT], "auto").choice == "auto"
    assert read_functions(None, None) == NO_TOOLS
    with pytest.raises(InvalidRequest) as refused:
        read_functions([{"name": "f", "parameters": 5}], None)
    assert refused.value.param == "functions[0].parameters"


def test_schemas_are_closed_unless_strict_is_off():
    strict = read_tools(TOOLS, None, None).schemas[0].parameters
    assert strict["additionalProperties"] is False
    loose = read_tools([{"type": "function", "function": {**REPORT, "strict": False}}], None, None)
    assert "additionalProperties" not in loose.schemas[0].parameters
    # The template sees what the client sent.
    assert loose.functions[0]["function"]["parameters"] == REPORT["parameters"]


def test_tools_need_a_template_that_shows_them():
    blind = AnswerFormat(SPECIAL)
    with pytest.raises(InvalidRequest, match="chat template shows no tools") as refused:
        blind.check(read_tools(TOOLS, "auto", None))
    assert refused.value.param == "tools"
    blind.check(read_tools(TOOLS, "required", None))
    HERMES.check(read_tools(TOOLS, "auto", None))


def test_constraints():
    auto, required = read_tools(TOOLS, "auto", None), read_tools(TOOLS, "required", None)
    schema = StructuredSpec(kind="json_schema", text='{"type": "integer"}')
    plain = AnswerFormat(SPECIAL)
    assert plain.constraint(NO_TOOLS, schema, "") is schema
    assert plain.constraint(NO_TOOLS, None, "") is None
    for use in (auto, required):
        spec = HERMES.constraint(use, None, "")
        assert spec is not None and spec.kind == "grammar" and "report" in spec.text
        assert spec.holds_json
    assert HERMES.constraint(auto, None, "") != HERMES.constraint(required, None, "")
    behind = HERMES.constraint(NO_TOOLS, schema, "<|im_start|>assistant\n<think>\n")
    assert behind is not None and "<[10]>" in behind.text and '%json {"type": "integer"' in behind.text
    assert behind.holds_json
    budget = HERMES.constraint(NO_TOOLS, None, "", 16)
    assert budget is not None and "max_tokens=16" in budget.text
    for free in (budget, HERMES.constraint(NO_TOOLS, StructuredSpec(kind="regex", text="a+"), "")):
        assert free is not None and free.kind == "grammar" and not free.holds_json
    assert HERMES.constraint(required, schema, "") == HERMES.constraint(required, None, "")
    with pytest.raises(InvalidRequest, match="must call a tool"):
        HERMES.constraint(required, StructuredSpec(kind="regex", text="a+"), "")
    with pytest.raises(InvalidRequest, match="keyword not"):
        HERMES.constraint(required, StructuredSpec(kind="json_schema", text='{"not": {}}'), "")


@pytest.mark.parametrize(
    ("spec", "body"),
    [
        (StructuredSpec(kind="json_schema", text='{"type": "integer"}'), '| %json {"type": "integer"'),
        (StructuredSpec(kind="json_object"), '| %json {"type": "object"'),
        (StructuredSpec(kind="choice", text='["a", "b"]'), '| ("a" | "b"))'),
        (StructuredSpec(kind="regex", text="[0-9]+"), "| /[0-9]+/)"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_an_answer_has_its_form_or_calls_functions(spec, body):
    """Agents give both, and the model calls functions until it knows the answer."""
    use = read_tools(TOOLS, "auto", None)
    found = HERMES.constraint(use, spec, "")
    assert found is not None and body in found.text and "report" in found.text and found.holds_json
    assert found != HERMES.constraint(use, None, "") and found is HERMES.constraint(use, spec, "")
    # Its calls are JSON at the beginning of the text, and a grammar is no part of another.
    alike = replace(HERMES, tools=TOOL_FORMATS["llama_json"], reasoning=None)
    assert alike.constraint(use, spec, "") is spec
    lark = StructuredSpec(kind="grammar", text='start: "a"')
    assert HERMES.constraint(use, lark, "") is lark


def test_a_thought_is_bounded_beside_any_other_constraint():
    auto, required = read_tools(TOOLS, "auto", None), read_tools(TOOLS, "required", None)
    schema = StructuredSpec(kind="json_schema", text='{"type": "integer"}')
    endless = replace(HERMES, special=SpecialTokens({"<think>": 9}, frozenset([1])))
    for use, spec in ((NO_TOOLS, None), (NO_TOOLS, schema), (auto, None), (required, None), (auto, schema)):
        bounded = HERMES.constraint(use, spec, "", 16)
        assert bounded is not None and "max_tokens=16" in bounded.text
        with pytest.raises(InvalidRequest, match="the tokenizer has no token </think>") as refused:
            endless.constraint(use, spec, "", 16)
        assert refused.value.param == "thinking_budget"
    plain = AnswerFormat(SPECIAL)
    assert plain.constraint(NO_TOOLS, None, "", 16) is None


def test_the_format_comes_from_the_template_or_the_configuration():
    template = ["{{ '<tool_call>' }}", "</think>"]
    assert answer_format(template, SPECIAL, None, None) == HERMES
    named = answer_format(template, SPECIAL, "pythonic", "none")
    assert named.tools is TOOL_FORMATS["pythonic"] and named.reasoning is None
    assert answer_format(["{{ messages }}"], SPECIAL, "auto", "auto") == AnswerFormat(SPECIAL)


def test_a_prompt_that_closes_its_own_thought_leaves_none_open():
    """Gemma 4's larger models are given an empty thought where they shouldn't think."""
    tags = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
    special = SpecialTokens({tag: 7 + place for place, tag in enumerate(tags)}, frozenset([1]))
    template = ["'<|channel>thought\\n<channel|>'", "'<|tool_call>call:' + function['name']"]
    gemma = answer_format(template, special, "auto", "auto")
    assert gemma.tools is TOOL_FORMATS["gemma4"] and gemma.reasoning is REASONING_TAGS["gemma4"]
    use = read_tools(TOOLS, "required", None)
    call = '<|tool_call>call:report{color:<|"|>red<|"|>}<tool_call|>'
    model = "<|turn>model\n"
    for prompt, answer, thought in (
        (f"{model}<|channel>thought\n<channel|>", call, ""),
        (model, f"<|channel>thought\nhm\n<channel|>{call}", "hm"),
        (f"{model}<|channel>thought\n", f"hm\n<channel|>{call}", "hm"),
    ):
        assert gemma.begins_inside(prompt) == (answer[0] == "h")
        parser = gemma.parser(use, prompt)
        assert parser is not None
        events = [*parser.feed(answer), *parser.finish()]
        assert "".join(each.text for each in events if isinstance(each, Reasoning)) == thought
        arguments = "".join(each.text for each in events if isinstance(each, CallArguments))
        assert json.loads(arguments) == {"color": "red"}
        spec = gemma.constraint(use, None, prompt)
        assert spec is not None and ("<[7]>" in spec.text) != gemma.begins_inside(prompt)


def test_a_family_names_the_tags_that_its_template_lacks():
    plain = ["{{ messages }}"]
    assert answer_format(plain, SPECIAL, "auto", "auto", "think").reasoning is REASONING_TAGS["think"]
    assert answer_format(plain, SPECIAL, "auto", "none", "think").reasoning is None
    shown = answer_format(["[/THINK]"], SPECIAL, "auto", "auto", "think")
    assert shown.reasoning is REASONING_TAGS["mistral"]


def test_schemas_are_prepared_wherever_they_stand():
    """``uniqueItems`` and unknown formats are left out, ``oneOf`` of two types becomes ``anyOf``."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "string", "format": "path"}, "uniqueItems": True},
            "b": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
        },
    }
    spec = StructuredSpec(kind="json_schema", text=json.dumps(schema))
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    behind = HERMES.constraint(NO_TOOLS, spec, "")
    for found in (behind, HERMES.constraint(read_tools([tool], "auto", None), None, "")):
        assert found is not None and found.kind == "grammar"
        assert not any(word in found.text for word in ("uniqueItems", '"format"', "oneOf"))
        assert "anyOf" in found.text and '"whitespace_flexible": false' in found.text


BAD = {"type": "object", "properties": {"a": {"not": {}}}}
STRICT = {"name": "f", "parameters": BAD, "strict": True}


@pytest.mark.parametrize(
    ("read", "param"),
    [
        (lambda: read_tools([*TOOLS, {"function": STRICT}], None, None),
         "tools[2].function.parameters"),
        (lambda: read_functions([STRICT], None), "functions[0].parameters"),
        (lambda: read_flat_tools([{"type": "function", **STRICT}], None, None), "tools[0].parameters"),
        (lambda: read_flat_tools([{"type": "function", **STRICT, "input_schema": BAD}], None, None,
                                 parameters="input_schema"), "tools[0].input_schema"),
    ],
    ids=["chat", "functions", "responses", "messages"],
)  # fmt: skip
def test_a_schema_that_no_grammar_can_follow_is_refused_by_its_field(read, param):
    use = read()
    with pytest.raises(InvalidRequest, match="the keyword not at /properties/a is not supported") as refused:
        HERMES.constraint(use, None, "")
    assert refused.value.param == param
    # No function may be called: the schema isn't needed.
    assert (
        HERMES.constraint(replace(use, choice="none"), StructuredSpec(kind="regex", text="a"), "") is not None
    )


@pytest.mark.parametrize("strict", [{}, {"strict": None}, {"strict": False}], ids=str)
def test_calls_of_functions_that_are_not_strict_follow_what_can_be_followed(strict):
    """Agents send schemas of many tools that they did not write, and each request has them all."""
    parameters = {**BAD, "properties": {"a": {"type": "integer", "not": {"const": 5}}, "b": {"enum": ["x"]}}}
    tools = [{"function": {"name": "f", "parameters": parameters, **strict}}, {"function": STRICT}]
    choice = {"type": "function", "function": {"name": "f"}}
    tools[1]["function"] = {**STRICT, "name": "g"}
    use = read_tools(tools, choice, None)
    spec = HERMES.constraint(use, None, "")
    assert spec is not None and '"integer"' in spec.text and '"x"' in spec.text and '"not"' not in spec.text
    # The prompt shows the schema as it was sent.
    assert use.functions[0]["function"]["parameters"] == parameters
    with pytest.raises(InvalidRequest, match="keyword not") as refused:
        HERMES.constraint(replace(use, allowed=None), None, "")
    assert refused.value.param == "tools[1].function.parameters"


#: Formats whose own rules write texts, the object of all arguments, and the objects within it.
OWN_TEXTS = {"qwen_xml", "glm", "gemma4", "muse"}
OWN_ARGUMENTS = {*OWN_TEXTS, "minicpm", "pythonic"}
OWN_OBJECTS = {"gemma4"}
TEXT = {"type": "string"}
A = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}
EITHER = {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]}
PARTS = {"allOf": [{**A, "properties": {"a": {"maxLength": 9, **TEXT}}}, A]}


def of(schema):
    return {**A, "properties": {"a": schema}}


@pytest.mark.parametrize(
    ("parameters", "keyword", "formats"),
    [
        (of({**TEXT, "format": "uri"}), "format", OWN_TEXTS),
        (of({**TEXT, "pattern": "^a$|^b$"}), "pattern", OWN_TEXTS),
        (of({"type": "array", "items": {**TEXT, "format": "uri"}}), "format", OWN_OBJECTS),
        (of({"type": "array", "items": TEXT, "uniqueItems": True}), "uniqueItems", TOOL_FORMATS.keys()),
        (of({**TEXT, "format": "binary"}), "format 'binary'", TOOL_FORMATS.keys()),
        (of({**TEXT, "format": []}), "format", OWN_TEXTS),
        (of({"anyOf": [{"format": "path"}, {"type": "null"}]}), "format 'path'", TOOL_FORMATS.keys()),
        (of({**A, "minProperties": 1}), "minProperties", OWN_OBJECTS),
        (of({**A, "maxProperties": 1}), "maxProperties", OWN_OBJECTS),
        (of(EITHER), "oneOf", OWN_OBJECTS),
        (of(PARTS), "allOf", OWN_OBJECTS),
        (of({**A, "patternProperties": {"^x_": TEXT}}), "patternProperties", set()),
        ({**A, "minProperties": 1}, "minProperties", OWN_ARGUMENTS),
        ({**A, "patternProperties": {"^x_": TEXT}}, "patternProperties", OWN_ARGUMENTS - OWN_OBJECTS),
        ({**A, "anyOf": [{"required": ["a"]}]}, "anyOf", OWN_ARGUMENTS),
        (PARTS, "allOf", OWN_ARGUMENTS),
        *((of({**TEXT, "format": kind}), "", set()) for kind in BOUNDED_FORMATS),
        (of({**TEXT, "format": "uuid", "pattern": "^[0-9]", "maxLength": 36}), "", set()),
        (of({"type": "integer", "format": "int64"}), "", set()),
        (of({"type": "array", "items": TEXT, "uniqueItems": False}), "", set()),
        (of({"type": ["string", "null"], "anyOf": [TEXT, {"type": "null"}]}), "", set()),
        (of({"type": "array", "items": {"anyOf": [{"type": "null"}, {"enum": ["x", 1]}]}, "minItems": 1}),
         "", set()),
    ],
)  # fmt: skip
def test_a_strict_function_is_refused_where_the_format_of_calls_is_not_held_to_a_keyword(
    parameters, keyword, formats
):
    """Calls of others are constrained without it. Arguments in JSON are held to all of these."""
    refusing = set()
    for name, each in TOOL_FORMATS.items():
        found = AnswerFormat(SPECIAL, each)
        function = {"name": "f", "parameters": parameters}
        assert found.constraint(read_tools([{"function": function}], None, None), None, "") is not None
        try:
            found.constraint(read_tools([{"function": {**function, "strict": True}}], None, None), None, "")
        except InvalidRequest as error:
            assert f"held to {keyword} as" in error.message
            assert error.param == "tools[0].function.parameters"
            refusing.add(name)
    assert refusing == formats


@pytest.mark.parametrize("definition", ["^a|b$", "a|b", "^(a|b)$", r"(a|b)\$", r"^[ab]\\$", "[ab$]"])
@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_the_whole_input_of_a_custom_tool_matches_its_regex(name, definition):
    """In each kind of format: a text in JSON, and one as it stands. The reference is Python's ``re``."""
    use = read_tools([custom("f", syntax="regex", definition=definition)], "required", False)
    words = Vocabulary("text")
    constraint = AnswerFormat(words.special, TOOL_FORMATS[name]).constraint(use, None, "")
    for text in ("a", "b", "ab", "a$", "b\\", "$", "xb", "ax", ""):
        if name == "hermes":
            call = f'<tool_call>\n{{"name": "f", "arguments": {json.dumps({"input": text})}}}\n</tool_call>'
        else:
            body = f"<parameter=input>\n{text}\n</parameter>"
            call = f"<tool_call>\n<function=f>\n{body}\n</function>\n</tool_call>"
        assert words.accepts(constraint.text, call) == bool(re.fullmatch(definition, text)), text


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_custom_tool_in_every_format_of_calls(name):
    """What its grammar lets a model write is read as a text that matches the regex, however it is cut."""
    words, definition = Vocabulary("tokens"), r'[a-z<>"\\/]{1,5}(\n|é|😀)[a-z ]{0,3}\$'
    found = AnswerFormat(words.special, TOOL_FORMATS[name])
    use = read_tools([custom("note", syntax="regex", definition=definition)], "required", False)
    constraint = found.constraint(use, None, "")
    for seed in range(3):
        written = words.walk(constraint.text, seed)
        (call,) = joined(found.parser(use, ""), [written.text])["calls"]
        assert call == joined(found.parser(use, ""), list(written.text))["calls"][0]
        assert written.finished and call[0] == "note" and re.fullmatch(definition, call[1])


LINES = r"""
start: "<" NAME ">" LF (LINE LF)~1..3 "end"
LINE: /[^\n]{0,4}/ | "\"\\" ("/a" | "é"i)
%import common (LF, CNAME)
NAME: CNAME
"""
LINES_REGEX = r'(?is)<[a-z_][a-z_0-9]*>\n(([^\n]{0,4}|"\\(/a|é))\n){1,3}end'


@pytest.mark.parametrize(
    ("name", "choice"),
    [*((name, "required") for name in TOOL_FORMATS), ("hermes", "auto"), ("llama_json", "auto")],
)
def test_a_custom_tool_by_a_lark_grammar_in_every_format_of_calls(name, choice):
    words = Vocabulary("tokens")
    found = AnswerFormat(words.special, TOOL_FORMATS[name])
    others = TOOLS if choice == "auto" else []
    use = read_tools([custom("note", syntax="lark", definition=LINES), *others], choice, False)
    constraint = found.constraint(use, None, "")
    calls = []
    for seed in range(3):
        written = words.walk(constraint.text, seed, frozenset(words.tags.values()))
        whole = joined(found.parser(use, ""), [written.text])["calls"]
        assert whole == joined(found.parser(use, ""), list(written.text))["calls"]
        calls += [call[1] for call in whole if written.finished and call[0] == "note"]
    assert all(re.fullmatch(LINES_REGEX, text) for text in calls) and (calls or choice == "auto")


@pytest.mark.parametrize("strict", [True, None])
@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_many_large_tools_are_refused_together(name, strict):
    """Each of them may come alone."""
    found = AnswerFormat(SPECIAL, TOOL_FORMATS[name])

    def refused(tools: list[dict]) -> str:
        assert all(found.constraint(read_tools([tool], None, None), None, "") for tool in tools[:1])
        with pytest.raises(InvalidRequest) as error:
            found.constraint(read_tools(tools, None, None), None, "")
        return error.value.param

    properties = {f"p{i}": {"type": "string", "maxLength": 5} for i in range(1000)}
    schema = {"type": "object", "properties": properties}
    wide = [{"function": {"name": f"f{i}", "parameters": schema, "strict": strict}} for i in range(15)]
    assert refused(wide) == "tools[13].function.parameters"
    texts = {"a": {"type": "string", "pattern": "[a-z]" * 6000}}
    schema = {"type": "object", "properties": texts}
    long = [{"function": {"name": f"f{i}", "parameters": schema, "strict": strict}} for i in range(20)]
    assert refused(long) == ("tools[8].function.parameters" if strict else "structured")
    lark = [custom(f"f{i}", syntax="lark", definition='start: "a"' + " " * 12_000) for i in range(3)]
    assert refused(lark) == "tools[2].custom.format.grammar.definition"


def test_faults_of_a_lark_grammar_are_named_by_its_field():
    tools = [*TOOLS, custom("f", syntax="lark", definition="start: A")]
    with pytest.raises(InvalidRequest, match="does not define A") as refused:
        HERMES.constraint(read_tools(tools, None, None), None, "")
    assert refused.value.param == "tools[2].custom.format.grammar.definition"
    form = {"type": "grammar", "syntax": "lark", "definition": "start: A"}
    tools = [{"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "f", "format": form}]}]
    with pytest.raises(InvalidRequest, match="does not define A") as refused:
        HERMES.constraint(read_flat_tools(tools, None, None), None, "")
    assert refused.value.param == "tools[0].tools[0].format.definition"


def test_functions_of_a_namespace_are_called_by_both_names():
    inner = [{"type": "function", **REPORT}, {"type": "function", "name": "stop", "strict": True}]
    tools = [{"type": "function", "name": "stop"}, {"type": "namespace", "name": "eye", "tools": inner}]
    use = read_flat_tools(tools, None, None)
    assert [tool.name for tool in use.schemas] == ["stop", "eye.report", "eye.stop"]
    assert [function["function"]["name"] for function in use.functions] == ["stop", "eye.report", "eye.stop"]
    assert use.fields[1:] == ("tools[1].tools[0].parameters", "tools[1].tools[1].parameters")
    assert use.strict == {"eye.stop"}
    assert names_in_namespaces(tools) == {"eye.report": ("eye", "report"), "eye.stop": ("eye", "stop")}


@pytest.mark.parametrize(
    ("inner", "choice", "param"),
    [
        ([{"type": "web_search", "name": "a"}], None, "tools[1].tools[0].type"),
        ([{"type": "custom", "name": 5}], None, "tools[1].tools[0].name"),
        ([{"type": "custom", "name": "a", "format": "x"}], None, "tools[1].tools[0].format.type"),
        (
            [{"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "lark"}}],
            None,
            "tools[1].tools[0].format.definition",
        ),
        ([{"type": "function", "name": 5}], None, "tools[1].tools[0].name"),
        ([{"type": "function", "name": "a"}] * 2, None, "tools[1].tools[1].name"),
        ([{"type": "function", "name": "a", "parameters": []}], None, "tools[1].tools[0].parameters"),
        ("a", None, "tools[1].tools"),
        (
            [],
            {"type": "allowed_tools", "tools": [{"type": "function", "name": "b"}]},
            "tool_choice.tools[0].name",
        ),
    ],
    ids=range(9),
)
def test_faults_in_a_namespace_are_named_by_their_place(inner, choice, param):
    tools = [{"type": "function", "name": "stop"}, {"type": "namespace", "name": "eye", "tools": inner}]
    with pytest.raises(SightlineError) as refused:
        read_flat_tools(tools, choice, None)
    assert refused.value.param == param and refused.value.message.removeprefix(
        "Unsupported parameter: "
    ).startswith(param.rpartition(".")[0])


@pytest.mark.parametrize(
    "read",
    [
        lambda choice: read_flat_tools([{"type": "function", "name": "f"}], choice, None),
        lambda choice: read_functions([{"name": "f"}], choice),
    ],
    ids=["flat", "functions"],
)
def test_a_message_quotes_the_caller_as_it_was(read):
    for name in ("tools[7]", "tools[0].function"):
        with pytest.raises(InvalidRequest, match="_c") as refused:
            read({"type": "function", "name": name})
        assert f" names {name!r}, " in refused.value.message


def test_functions_under_function_in_a_namespace():
    inner = [{"type": "function", "function": REPORT}, {"type": "function", "name": "stop"}]
    tools = [{"type": "namespace", "name": "eye", "tools": inner}]
    use = read_flat_tools(tools, None, None)
    assert [tool.name for tool in use.schemas] == ["eye.report", "eye.stop"]
    assert use.functions[0]["function"] == {**REPORT, "name": "eye.report"}
    assert names_in_namespaces(tools) == {"eye.report": ("eye", "report"), "eye.stop": ("eye", "stop")}
    assert inner[0]["function"]["name"] == "report"


def test_a_format_made_from_another_keeps_constraints_of_its_own():
    other = replace(HERMES, tools=TOOL_FORMATS["glm"])
    assert other.kept is not HERMES.kept and other == replace(other)
    use = read_tools(TOOLS, "required", None)
    assert HERMES.constraint(use, None, "").text != other.constraint(use, None, "").text


def test_functions_that_come_again_have_the_constraint_that_was_made_for_them():
    spec = HERMES.constraint(read_tools(TOOLS, "auto", None), None, "")
    assert HERMES.constraint(read_tools(json.loads(json.dumps(TOOLS)), None, True), None, "") is spec
    report, stop = TOOLS
    swapped = {**REPORT, "parameters": {**REPORT["parameters"], "properties": {"size": {}, "color": {}}}}
    others = [
        read_tools(TOOLS, "required", None),
        read_tools(TOOLS, "auto", False),
        read_tools([stop, report], "auto", None),
        read_tools([report], "auto", None),
        read_tools([{"function": {**REPORT, "name": "tell"}}, stop], "auto", None),
        read_tools([{"function": {**REPORT, "strict": False}}, stop], "auto", None),
        read_tools([{"function": swapped}, stop], "auto", None),
        read_tools(TOOLS, {"type": "function", "function": {"name": "stop"}}, None),
    ]
    found = [spec, *(HERMES.constraint(use, None, "") for use in others)]
    found += [HERMES.constraint(others[0], None, prompt, 5) for prompt in ("", "<think>")]
    assert len({each.text for each in found if each is not None}) == len(found)


@pytest.mark.parametrize("levels", [40, 150, 300])
def test_a_schema_that_is_nested_too_deeply_is_refused(levels):
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    use = read_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}], None, None)
    with pytest.raises(InvalidRequest, match="nested deeper than 64 levels") as refused:
        HERMES.constraint(use, None, "")
    assert refused.value.param == "tools[0].function.parameters"


def test_a_regex_behind_a_thought_may_hold_slashes():
    spec = HERMES.constraint(NO_TOOLS, StructuredSpec(kind="regex", text=r"a/b\/\d"), "")
    assert spec is not None and r"/a\/b\/[0-9]/" in spec.text


async def test_an_answer_with_a_thought_and_a_call():
    use = read_tools(TOOLS, None, None)
    arguments = json.dumps({"color": "red"})
    text = f'<think>hm</think>Look: <tool_call>\n{{"name": "report", "arguments": {arguments}}}\n</tool_call>'

    async def updates():
        for position, character in enumerate(text):
            reason = "stop" if position == len(text) - 1 else None
            deltas = [OutputDelta(0, character, [position], finish_reason=reason)]
            if reason:
                deltas.append(OutputDelta(1, "plain", [len(text)], finish_reason="stop"))
            yield StreamUpdate("r", deltas, Usage(3, position + 1), finished=reason is not None)

    spelled = Spelled({**dict(enumerate(text)), len(text): "plain"})
    answer = await gather(updates(), AnswerReader(lambda: HERMES.parser(use, ""), spelled))
    first, second = answer.choices
    assert (first.text, first.reasoning) == ("Look:", "hm")
    assert [(call.name, call.arguments) for call in first.calls] == [("report", arguments)]
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "stop")
    assert second.text == "plain" and not second.calls
    assert first.token_ids == list(range(len(text)))
    # The tag that closes the thought belongs to it.
    assert answer.reasoning_tokens == len("hm</think>")


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_a_call_that_was_cut_off_ends_by_its_length(reason):
    """A client must not run a call whose arguments are not whole."""
    use = read_tools(TOOLS, None, None)
    whole = '<tool_call>\n{"name": "report", "arguments": {"color": "red"}}\n</tool_call>'
    text = whole if reason == "stop" else whole[: whole.index("red") + 2]

    async def updates():
        delta = OutputDelta(0, text, [1, 2, 3], finish_reason=reason)
        yield StreamUpdate("r", [delta], Usage(3, 3), finished=True)

    (choice,) = (await gather(updates(), AnswerReader(lambda: HERMES.parser(use, "")))).choices
    assert choice.calls and choice.calls[0].name == "report"
    assert choice.finish_reason == ("tool_calls" if reason == "stop" else "length")


@pytest.mark.parametrize("tool", [TOOLS[0], custom("report")], ids=["function", "custom"])
@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "gemma4", "minicpm", "llama_json"])
def test_a_call_that_a_stop_string_cuts_is_no_whole_one(name, tool):
    """It is one as soon as nothing but tags behind it is missing."""
    words = Vocabulary("tokens")
    found, use = AnswerFormat(words.special, TOOL_FORMATS[name]), read_tools([tool], "required", False)
    text = words.walk(found.constraint(use, None, "").text, 1).text

    def read(end: int, stop: str | None) -> FinishedChoice:
        choice, reader = FinishedChoice(0), AnswerReader(lambda: found.parser(use, ""))
        choice.add(reader.read(OutputDelta(0, text[:end], [1], finish_reason="stop", stop_reason=stop)))
        return choice

    cut = [read(end, "x") for end in range(len(text) + 1)]
    reasons = [choice.finish_reason for choice in cut]
    whole = reasons.index("tool_calls")
    assert reasons == ["stop"] * whole + ["tool_calls"] * (len(reasons) - whole)
    assert cut[whole].calls == cut[-1].calls and cut[whole - 1].calls
    # Without a stop string the model has ended it.
    assert read(whole - 1, None).finish_reason == "tool_calls"


def test_a_call_behind_a_whole_one_may_be_cut():
    use = read_tools([custom("say"), *TOOLS], None, None)
    says = '<tool_call>\n{"name": "say", "arguments": {"input": "a"}}\n</tool_call>\n'
    stops = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n'
    for whole, begun in ((says, stops[:-18]), (stops, says[:-21])):
        for text, reason in ((whole, "tool_calls"), (whole + begun, "stop")):
            reader = AnswerReader(lambda: HERMES.parser(use, ""))
            read = reader.read(OutputDelta(0, text, [1], finish_reason="stop", stop_reason="x"))
            assert read.finish_reason == reason, text


@pytest.mark.parametrize("name", [name for name, form in TOOL_FORMATS.items() if form.layout.trigger])
def test_tags_of_a_call_that_was_cut_off_are_no_text(name):
    """Wherever a limit cuts a call: none of its syntax is shown, and what was written before it is."""
    words = Vocabulary("tokens")
    found, use = AnswerFormat(words.special, TOOL_FORMATS[name]), read_tools(TOOLS, "required", False)
    call, trigger = words.walk(found.constraint(use, None, "").text, 1).text, found.tools.layout.trigger
    for said in ("", "I look."):
        for end in range(len(trigger), len(call) + 1, 2 if said else 1):
            text, reader = said + call[:end], AnswerReader(lambda: found.parser(use, ""))
            choice = FinishedChoice(0)
            choice.add(reader.read(OutputDelta(0, text, [1], finish_reason="length")))
            assert choice.text == said and choice.finish_reason == "length"
    if found.tools.anywhere:
        thinks = replace(found, reasoning=REASONING_TAGS["think"])
        for end in range(len(trigger), len(call) + 1, 4):
            reader, choice = AnswerReader(lambda: thinks.parser(use, "")), FinishedChoice(0)
            text = "<think>I look." + call[:end]
            choice.add(reader.read(OutputDelta(0, text, [1], finish_reason="length")))
            assert (choice.reasoning, choice.text) == ("I look.", "")
    # A model that ends there itself has written text.
    reader = AnswerReader(lambda: found.parser(use, ""))
    (event,) = reader.read(OutputDelta(0, trigger, [1], finish_reason="stop")).events
    assert event.text == trigger


class Spelled:
    """Tokens by their texts."""

    def __init__(self, texts: dict[int, str]) -> None:
        self.token_bytes = self.first_token_bytes = lambda token: texts[token].encode()


@pytest.mark.parametrize(
    ("tokens", "opened", "counted"),
    [
        (["<think>", "h", "m", "</think>", "\n\n", "Look"], False, 3),
        (["<thi", "nk>h", "m, é", "</", "think", ">\nLo", "ok"], False, 5),
        (["<think>", "</think>", "Look"], False, 1),
        (["<think>", "no", " end"], False, 2),
        (["h", "m", "</think>", "Look"], True, 3),
        (["Look", ": <think>", "hm</think>"], False, 0),
        (['<tool_call>\n{"name": "report", "arg', 'uments": {"color": "red"}}\n</tool_call>'], False, 0),
    ],
)
def test_tokens_of_a_thought_are_the_same_however_an_answer_is_cut(tokens, opened, counted):
    """How many tokens a delta holds depends on how far behind its reader is. The delta in which the thought
    ends tells which of its tokens are behind it."""
    use = read_tools(TOOLS, None, None)
    behind = {token for token in range(len(tokens)) if "</think>" in "".join(tokens[:token])}

    def count(cuts: list[int]) -> int:
        reader = AnswerReader(
            lambda: HERMES.parser(use, "<think>" if opened else ""), Spelled(dict(enumerate(tokens)))
        )
        for start, end in pairwise([0, *cuts, len(tokens)]):
            ids = list(range(start, end))
            read = reader.read(OutputDelta(0, "".join(tokens[i] for i in ids), ids))
            if counted and "</think>" in "".join(tokens[:end]):
                assert {*ids[read.num_thought :]} == behind & {*ids}
        return reader.reasoning_tokens

    inner = range(1, len(tokens))
    all_cuts = [list(cuts) for size in range(len(tokens)) for cuts in combinations(inner, size)]
    assert {count(cuts) for cuts in all_cuts} == {counted}


def test_tags_around_the_visible_text_are_dropped_where_thoughts_are_not_parsed():
    found = AnswerFormat(SPECIAL, TOOL_FORMATS["cohere"]).parser(read_tools(TOOLS, "auto", None), "")
    events = found.feed("<|START_RESPONSE|>Yes.<|END_RESPONSE|>") + found.finish()
    assert "".join(event.text for event in events) == "Yes."
