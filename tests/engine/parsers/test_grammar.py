"""Grammars of tool calls: what they allow parses to calls that keep their schemas, and text stays free."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jsonschema
import llguidance
import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine.parsers.answer import AnswerParser
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS, ToolFormat, reasoning_tags_of, tool_format_of
from engine.parsers.grammar import (
    SpecialTokens,
    Thought,
    ToolSchema,
    grammar_behind_thought,
    grammar_with_budget,
    tool_grammar,
)
from engine.parsers.reasoning import ReasoningParser
from engine.structured.json_schema import prepare_schema
from engine.structured.vocabulary import Vocabulary as Masks
from engine.text.spelling import Speller
from engine.text.tokenizer import Tokenizer
from tests.engine.parsers.cuts import joined
from tests.engine.structured.test_formats import TEXTS
from tests.engine.tokenizers import byte_fallback, byte_level

THINK = REASONING_TAGS["think"]
TOOLS = [
    ToolSchema(
        "report",
        {
            "type": "object",
            "properties": {
                "color": {"enum": ["red", "blue"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 9},
                "sure": {"type": "boolean"},
                "note": {"type": "string", "maxLength": 5},
            },
            "required": ["color", "count"],
            "additionalProperties": False,
        },
    ),
    ToolSchema("stop", {"type": "object", "properties": {}, "additionalProperties": False}),
    ToolSchema(
        "pick",
        {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"type": "boolean"}},
            "additionalProperties": False,
        },
    ),
]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
TAGS = (
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|action_start|>", "<|plugin|>",
    "<|action_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|python_tag|>", "<think>",
    "</think>", "<|other|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call|>",
    "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>",
)  # fmt: skip

#: Vocabularies in which the tags are added tokens, and in which they are plain text.
VOCABULARIES = {"tokens": (byte_level, "<|im_end|>"), "text": (byte_fallback, "</s>")}


#: Texts that end a free text in one of the formats.
CLOSINGS = ("\n</parameter>\n", "</arg_value>", "</think>", '"', '<|"|>')


class Walk(NamedTuple):
    """An answer, and whether it came to its end within the limit."""

    text: str
    finished: bool
    tokens: list[int]

    def calls(self, parsed: dict[str, Any]) -> list[tuple[str, str]]:
        """The calls that are complete: the limit may have cut the last one."""
        return parsed["calls"] if self.finished else parsed["calls"][:-1]


class Vocabulary:
    """A tokenizer, as the grammar engine and the grammars see it."""

    def __init__(self, name: str, tags: tuple[str, ...] = TAGS) -> None:
        make, end = VOCABULARIES[name]
        self.backend: Backend = make()
        if name != "text":
            self.backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
        tokenizer = Tokenizer(self.backend, {})
        self.size = self.backend.get_vocab_size(with_added_tokens=True)
        self.end = self.backend.token_to_id(end)
        ends = frozenset([self.end])
        speller = Speller(tokenizer, self.size, ends | frozenset(tokenizer.added_tokens))
        control = {index: self.backend.id_to_token(index) for index in sorted(speller.control_ids)}
        cuts_all = speller.segmenter.cuts_all
        vocabulary = Masks(speller.token_bytes, control, [self.end], speller.spell, cuts_all)
        self.engine = vocabulary.for_llguidance()
        self.special = SpecialTokens({name: index for index, name in control.items()}, ends)
        #: The text of each token; added tokens spell themselves.
        self.bytes = [
            control[index].encode() if index in control else speller.token_bytes[index]
            for index in range(self.size)
        ]
        self.tags = {tag: self.backend.token_to_id(tag) for tag in tags if name != "text"}
        self.encode = speller.spell if name == "text" else self._encode

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def text(self, tokens: list[int]) -> str:
        return b"".join(self.bytes[token] for token in tokens).decode(errors="replace")

    def accepts(self, grammar: str, text: str) -> bool:
        """Return whether the grammar allows ``text`` as a whole answer."""
        matcher = llguidance.LLMatcher(self.engine, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = self.encode(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def walk(self, grammar: str, seed: int, tags: frozenset[int] = frozenset(), limit: int = 300) -> Walk:
        """Choose tokens at random among those allowed, ``tags`` nine times in ten where they are allowed."""
        matcher = llguidance.LLMatcher(self.engine, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        rng, tokens = random.Random(seed), []
        mask = np.zeros((self.size + 31) // 32, np.int32)
        while len(tokens) < limit:
            if len(tokens) > 60 and rng.random() < 0.3:
                # Chance alone would hardly ever spell the end of a free text.
                closing = self.encode(rng.choice(CLOSINGS))
                tokens += closing[: matcher.try_consume_tokens(closing)]
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            assert allowed, "the grammar has no way on"
            liked = [token for token in allowed if token in tags]
            ends = matcher.is_accepting() and rng.random() < 0.2
            token = self.end if ends else rng.choice(liked if liked and rng.random() < 0.9 else allowed)
            if token == self.end:
                assert matcher.is_accepting()
                return Walk(self.text(tokens), True, tokens)
            matcher.consume_token(token)
            tokens.append(token)
        return Walk(self.text(tokens), False, tokens)


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(name)


def grammar(found: ToolFormat, words: Vocabulary, choice="auto", **options) -> str:
    return tool_grammar(found.layout, TOOLS, words.special, choice=choice, **options)


def cells(formats: Iterable[ToolFormat]) -> pytest.MarkDecorator:
    """Each of the formats with each vocabulary."""
    pairs = [(found, words) for found in formats for words in VOCABULARIES]
    return pytest.mark.parametrize(("found", "words"), pairs, ids=lambda value: getattr(value, "name", value))


CELLS = cells(TOOL_FORMATS.values())


def check_calls(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@CELLS
def test_required_calls_keep_their_schemas(found, words):
    words = vocabulary(words)
    text = grammar(found, words, "required")
    for seed in range(6):
        walk = words.walk(text, seed)
        parsed = joined(found.parser(SCHEMAS), [walk.text])
        # An unfinished call is text.
        assert parsed["calls"] and not (walk.finished and parsed["text"].strip()), walk
        check_calls(walk.calls(parsed))


@CELLS
def test_one_call_where_calls_are_not_parallel(found, words):
    words = vocabulary(words)
    text = grammar(found, words, "required", parallel=False)
    for seed in range(4):
        walk = words.walk(text, seed)
        parsed = joined(found.parser(SCHEMAS), [walk.text])
        assert len(parsed["calls"]) == 1
        check_calls(walk.calls(parsed))


@CELLS
def test_text_stays_free_and_calls_in_it_keep_their_schemas(found, words):
    words = vocabulary(words)
    text = grammar(found, words)
    for plain in ("Hello!", "a < b, {c} and [d]", '{"color": "red"}', "two\n\nlines", ""):
        assert words.accepts(text, plain), plain
    trigger = frozenset(words.tags[tag] for tag in (found.layout.trigger,) if tag in words.tags)
    called = 0
    for seed in range(8):
        walk = words.walk(text, seed, trigger, limit=150)
        parsed = joined(found.parser(SCHEMAS), [walk.text])
        check_calls(walk.calls(parsed))
        called += len(parsed["calls"])
    assert called or not trigger


def call_of(found: ToolFormat, name: str) -> str:
    """A call without arguments, as the format writes it."""
    call = {
        "hermes": '<tool_call>\n{"name": "NAME", "arguments": {}}\n</tool_call>',
        "qwen_xml": "<tool_call>\n<function=NAME>\n</function>\n</tool_call>",
        "glm": "<tool_call>NAME\n</tool_call>",
        "granite": '<|tool_call|>[{"name": "NAME", "arguments": {}}]',
        "cohere": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "NAME", "parameters": {}}\n]'
        "<|END_ACTION|>",
        "mistral": '[TOOL_CALLS][{"name": "NAME", "arguments": {}}]',
        "mistral_names": "[TOOL_CALLS]NAME[ARGS]{}",
        "internlm": '<|action_start|><|plugin|>\n{"name": "NAME", "parameters": {}}\n<|action_end|>',
        "gemma4": "<|tool_call>call:NAME{}<tool_call|>",
        "muse": '<atem:function_calls>\n<atem:invoke name="NAME">\n</atem:invoke>\n</atem:function_calls>',
        "minicpm": "<|tool_call_start|>\n```python\nNAME()\n```\n<|tool_call_end|>",
        "llama_json": '{"name": "NAME", "parameters": {}}',
        "pythonic": "[NAME()]",
    }[found.name]
    return call.replace("NAME", name)


@CELLS
def test_a_call_of_an_unknown_function_is_not_allowed(found, words):
    words = vocabulary(words)
    for choice in ("auto", "required"):
        text = grammar(found, words, choice)
        assert words.accepts(text, call_of(found, "stop"))
        assert not words.accepts(text, call_of(found, "other"))


@pytest.mark.parametrize(
    ("form", "fits", "fails"),
    [
        (
            '%json {"x-guidance": {"whitespace_flexible": false}, "type": "object", '
            '"properties": {"name": {"const": "stop"}}, "required": ["name"], "additionalProperties": false}',
            '{"name":"stop"}',
            '{"name":"go"}',
        ),
        ('("yes" | "no")', "yes", "maybe"),
        ("/[a-z]{3}/", "abc", "ab"),
    ],
    ids=["JSON", "choice", "regex"],
)
@cells(found for found in TOOL_FORMATS.values() if found.layout.trigger)
def test_an_answer_is_calls_or_what_else_it_must_be(found, words, form, fits, fails):
    words = vocabulary(words)
    for thought, lead in ((None, ""), (Thought(THINK), ""), (Thought(THINK, True), "hm</think>")):
        text = grammar(found, words, otherwise=form, thought=thought)
        assert words.accepts(text, lead + call_of(found, "stop")) and words.accepts(text, lead + fits)
        for other in (call_of(found, "other"), fails, "Hello!", fits + call_of(found, "stop"), ""):
            assert not words.accepts(text, lead + other), other
    text = grammar(found, words, otherwise=form)
    trigger = frozenset(words.tags[tag] for tag in (found.layout.trigger,) if tag in words.tags)
    for seed in range(2):
        walk = words.walk(text, seed, trigger, limit=150)
        parsed = joined(found.parser(SCHEMAS), [walk.text])
        check_calls(walk.calls(parsed))
        assert not (walk.finished and parsed["calls"] and parsed["text"].strip())


@pytest.mark.parametrize("words", VOCABULARIES)
@pytest.mark.parametrize(
    ("name", "head", "end"),
    [
        (
            "qwen_xml",
            "<tool_call>\n<function=report>\n<parameter=color>\nred\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
            "<parameter=note>\n",
            "\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "glm",
            "<tool_call>report\n<arg_key>color</arg_key>\n<arg_value>red</arg_value>\n<arg_key>count</arg_key>"
            "<arg_value>3</arg_value><arg_key>note</arg_key>\n<arg_value>",
            "</arg_value>\n</tool_call>",
        ),
        (
            "muse",
            '<atem:function_calls>\n<atem:invoke name="report">\n'
            '<atem:parameter name="color">red</atem:parameter>\n'
            '<atem:parameter name="count">3</atem:parameter>\n<atem:parameter name="note">',
            "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>",
        ),
        (
            "gemma4",
            '<|tool_call>call:report{color:<|"|>red<|"|>,count:3,note:<|"|>',
            '<|"|>}<tool_call|>',
        ),
    ],
)
def test_texts_between_tags_have_every_length_up_to_their_limit(name, head, end, words):
    words, found = vocabulary(words), TOOL_FORMATS[name]
    text = grammar(found, words, "required")
    for note in ("", "ab", "abcde", "</", "a\nb"):
        assert words.accepts(text, head + note + end), note
        ((_, arguments),) = joined(found.parser(SCHEMAS), [head + note + end])["calls"]
        assert json.loads(arguments) == {"color": "red", "count": 3, "note": note}
    assert not words.accepts(text, f"{head}abcdef{end}")


#: A call of ``f`` with the text TEXT as its argument ``a``, by format of calls.
CALLS_OF_TEXT = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "TEXT"}}\n</tool_call>',
    "qwen_xml": "<tool_call>\n<function=f>\n<parameter=a>\nTEXT\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>TEXT</arg_value>\n</tool_call>",
    "gemma4": '<|tool_call>call:f{a:<|"|>TEXT<|"|>}<tool_call|>',
    "pythonic": '[f(a="TEXT")]',
}
BOUNDED_TEXTS = [({"format": kind}, *texts) for kind, texts in TEXTS.items()]


@pytest.mark.parametrize("words", VOCABULARIES)
@pytest.mark.parametrize("name", CALLS_OF_TEXT)
def test_texts_follow_formats_patterns_and_lengths_together(name, words):
    """In calls whose texts are bare as in those whose texts are JSON."""
    words, found = vocabulary(words), TOOL_FORMATS[name]
    for schema, good, bad in [
        *BOUNDED_TEXTS,
        ({"format": "email", "maxLength": 9}, ["joe@x.org"], ["joey@x.org", "joe"]),
        ({"format": "ipv4", "pattern": "^10[.]"}, ["10.0.0.1"], ["11.0.0.1", "10.0.0"]),
        ({"pattern": "^a+$", "minLength": 2, "maxLength": 3}, ["aa", "aaa"], ["a", "aaaa", "ab"]),
    ]:
        parameters = {"type": "object", "properties": {"a": {"type": "string", **schema}}, "required": ["a"]}
        tool = ToolSchema("f", prepare_schema({**parameters, "additionalProperties": False}))
        text = tool_grammar(found.layout, [tool], words.special, choice="required", parallel=False)
        for each in [*good, *bad]:
            assert words.accepts(text, CALLS_OF_TEXT[name].replace("TEXT", each)) == (each in good), each


@CELLS
def test_a_thought_may_come_first(found, words):
    words = vocabulary(words)
    tags = frozenset(words.tags[tag] for tag in (THINK.start, THINK.end) if tag in words.tags)
    for inside in (False, True):
        text = grammar(found, words, "required", thought=Thought(THINK, inside))
        thought = 0
        for seed in range(4):
            walk = words.walk(text, seed, tags)
            reasoning = ReasoningParser(THINK, begins_inside=inside)
            calls = found.parser(SCHEMAS)
            parsed = joined(AnswerParser(reasoning, calls, calls_in_thoughts=found.anywhere), [walk.text])
            # An unfinished call is text.
            assert not (walk.finished and parsed["text"].strip()), walk
            check_calls(walk.calls(parsed))
            thought += THINK.end in walk.text
        assert thought or not (inside or tags)


@pytest.mark.parametrize("words", VOCABULARIES)
def test_structured_output_begins_behind_the_thought(words):
    words = vocabulary(words)
    text = grammar_behind_thought('%json {"type": "integer"}', words.special, Thought(THINK))
    assert words.accepts(text, "<think>12 {x}\n</think>\n12")
    assert words.accepts(text, "12")
    assert not words.accepts(text, "<think>hm</think>\ntwelve")
    inside = grammar_behind_thought('%json {"type": "integer"}', words.special, Thought(THINK, True))
    assert words.accepts(inside, "hm</think>12") and not words.accepts(inside, "12")


@pytest.mark.parametrize("words", VOCABULARIES)
def test_structured_output_may_have_the_tags_of_a_visible_text(words):
    words, tags = vocabulary(words), replace(THINK, around=("<|tool_call|>", "<|other|>"))
    behind = grammar_behind_thought('%json {"type": "integer"}', words.special, Thought(tags))
    instead = grammar(TOOL_FORMATS["hermes"], words, otherwise="/[0-9]{2}/", thought=Thought(tags))
    for text in (behind, instead):
        for answer in ("12", "<think>hm</think>\n<|tool_call|>12<|other|>", "<|tool_call|>12"):
            assert words.accepts(text, answer), answer
        assert not words.accepts(text, "<|tool_call|>twelve") and not words.accepts(text, "<|tool_call|>")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_within_its_budget(inside, budget):
    words = vocabulary("tokens")
    text = grammar_with_budget(words.special, Thought(THINK, inside, budget))
    start, end = words.tags[THINK.start], words.tags[THINK.end]
    for seed in range(6):
        tokens = words.walk(text, seed, frozenset([start]), limit=40).tokens
        if inside or tokens[:1] == [start]:
            assert tokens.index(end) - (not inside) <= budget
    assert words.accepts(text, THINK.end if inside else THINK.start + THINK.end)
    assert budget < 7 or words.accepts(text, ("" if inside else THINK.start) + "hm" + THINK.end + "so")
    assert inside or words.accepts(text, "no thought")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", None])
def test_a_thought_before_calls_or_json_ends_within_its_budget(choice, inside):
    """Also where calls are plain text, none of which stands in the thought."""
    words, budget = vocabulary("tokens"), 5
    start, end = words.tags[THINK.start], words.tags[THINK.end]
    thought = Thought(THINK, inside, budget)
    formats = list(TOOL_FORMATS.values()) if choice else [None]
    called = 0
    for found in formats:
        if found is None:
            text = grammar_behind_thought('%json {"type": "integer"}', words.special, thought)
        else:
            text = grammar(found, words, choice, thought=thought)
        opened = "" if inside else THINK.start
        assert not words.accepts(text, f"{opened}{'word ' * 9}{THINK.end}1")
        for seed in range(3):
            walk = words.walk(text, seed, frozenset([start]))
            if not inside and start not in walk.tokens:
                continue
            first = 0 if inside else walk.tokens.index(start) + 1
            assert end in walk.tokens and walk.tokens.index(end) - first <= budget
            # No second thought where the first could have been left out.
            assert start not in walk.tokens[first:] or found is None or not found.layout.trigger
            if found is not None:
                reasoning = ReasoningParser(THINK, begins_inside=inside)
                parser = AnswerParser(reasoning, found.parser(SCHEMAS), calls_in_thoughts=found.anywhere)
                parsed = joined(parser, [walk.text])
                check_calls(walk.calls(parsed))
                called += len(walk.calls(parsed))
    assert called or choice != "required"


def test_a_bounded_thought_holds_no_call():
    """Its arguments would follow no schema."""
    for words in (vocabulary("tokens"), Vocabulary("tokens", (THINK.start, THINK.end))):
        for found in TOOL_FORMATS.values():
            if trigger := found.layout.trigger:
                text = grammar(found, words, thought=Thought(THINK, True, 99))
                assert words.accepts(text, f"So a call?{THINK.end}"), found.name
                assert not words.accepts(text, f"So{trigger}{{}}{THINK.end}"), found.name


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }} {\"name\": <function-name>}", "hermes"),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen_xml"),
        ("<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>", "glm"),
        ("respond only with <|tool_call|> followed by a JSON list of tools used", "granite"),
        ('<|START_ACTION|>[{"tool_call_id": "0", "tool_name": }]<|END_ACTION|>', "cohere"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_names"),
        ("<|python_tag|> {\"name\": function name, \"parameters\": dictionary}", "llama_json"),
        ("<|action_start|><|plugin|>", "internlm"),
        ("{{- '<|tool_call>call:' + function['name'] + '{' -}} <tool_call|>", "gemma4"),
        ("<|tool_call_start|>", "minicpm"),
        ('<atem:function_calls>\n<atem:invoke name="$NAME">', "muse"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)  # fmt: skip
def test_the_template_tells_the_format(template, name):
    found = tool_format_of(template)
    assert (found and found.name) == name


def test_the_template_tells_the_tags_of_thoughts():
    assert reasoning_tags_of("{{ '<think>\\n' }} </think>") is THINK
    assert reasoning_tags_of("'<|channel>thought\\n<channel|>'") is REASONING_TAGS["gemma4"]
    assert reasoning_tags_of("nothing") is None
