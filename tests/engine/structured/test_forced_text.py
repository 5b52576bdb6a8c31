"""Text that a grammar forces comes out as it is, in every kind of vocabulary."""

import json
import random
from functools import cache

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.parsers.call_forms import PYTHON_CALL, XML_CALL
from engine.parsers.formats import TOOL_FORMATS
from engine.parsers.grammar import SpecialTokens, ToolSchema, tool_grammar
from engine.sampling_params import MAX_STRUCTURED_TEXT, StructuredSpec
from engine.structured.grammar import GrammarCompiler
from engine.structured.json_escapes import with_escapes, within_escape
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TEXTS = [
    "plain",
    "<tool_call>{",
    "<|im_end|>x",
    "x<|image_pad|>",
    "x</s>y",
    "<s>x",
    "a<image>b",
    "<|end|> x",
    "e\u0301x",
    "\u212bx",
    " x",
    "  x",
    "x ",
    "\tx",
    "x\r\ny",
    "é",
    "\u00a0x",
    "a\u2028b",
    "\ufeffx",
    "<0x41>▁",
]


class Vocabulary:
    def __init__(self, name: str) -> None:
        make, config = KINDS[name]
        self.tokenizer = Tokenizer(make(), config)
        self.size = self.tokenizer.vocab_size + 7
        self.eos = self.tokenizer.role_id("eos_token")
        self.compiler = GrammarCompiler(self.tokenizer.backend, self.size, [self.eos], time_limit=20.0)

    def compile(self, kind: str, text: str):
        return self.compiler.compile(StructuredSpec(kind=kind, text=text))

    def allowed(self, matcher) -> list[int]:
        mask = np.zeros((self.size + 31) // 32, np.int32)
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert not bits[self.size :].any()
        return np.flatnonzero(bits).tolist()

    def follow(self, matcher, seed: int, steps: int = 80) -> bytes | None:
        """The text of random allowed tokens up to the end; None if none comes."""
        rng, data = random.Random(seed), b""
        for _ in range(steps):
            tokens = self.allowed(matcher)
            assert tokens, "the grammar can't go on"
            token = rng.choice([token for token in tokens if token != self.eos] or tokens)
            assert matcher.accept([token])
            if token == self.eos:
                assert matcher.is_complete
                return data
            data += self.tokenizer.token_bytes(token)
        return None

    def accepts(self, matcher, text: str) -> bool:
        """Return whether the answer ``text``, a byte or character a token, is whole."""
        ids = [i for c in text for i in self.tokenizer.encode_piece(c)]
        return matcher.accept(ids) and matcher.is_complete


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(name)


@pytest.fixture(scope="module", autouse=True)
def processes_end():
    yield
    for name in KINDS:
        vocabulary(name).compiler.close()
    # Tests of this file may follow those of another once more.
    vocabulary.cache_clear()


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "legacy_fallback"])
def test_forced_text_comes_out_whole(name):
    model = vocabulary(name)
    for text in TEXTS:
        schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
        schema["additionalProperties"] = False
        grammars = [model.compile("choice", json.dumps([text, text + "!"]))]
        grammars.append(model.compile("json_schema", json.dumps(schema)))
        for seed in range(3):
            assert model.follow(grammars[0].matcher(), seed) in (text.encode(), text.encode() + b"!")
            answer = model.follow(grammars[1].matcher(), seed)
            assert answer is not None and json.loads(answer) == {text: text}


def test_a_long_text_is_forced_piece_by_piece():
    """To force it in one go would hold up everything else for seconds."""
    model = vocabulary("byte_level")
    letters = "".join(random.Random(0).choices("abcdefgh", k=600))
    matcher = model.compile("json_schema", json.dumps({"const": letters})).matcher()
    pieces = [matcher.open(4096, ())]
    while pieces[-1]:
        pieces.append(matcher.force(4096, ()))
    assert [len(piece) for piece in pieces[:2]] == [64, 256]
    text = b"".join(model.tokenizer.token_bytes(token) for piece in pieces for token in piece)
    assert matcher.is_finished and json.loads(text) == letters


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "legacy_fallback"])
def test_tokens_taken_together_are_those_taken_one_by_one(name):
    """How many are taken together is kept: several answers of a grammar meet what earlier ones have left."""
    model = vocabulary(name)
    fields = {
        "the red circle": {"enum": ["the red", "the redder", "  12345 x", "12345"]},
        "n": {"type": "integer"},
        "n\u0303": {"enum": ["aé\u0301x", "aéb", '"a\\"']},
    }
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    grammar, together = model.compile("json_schema", json.dumps(schema)), 0
    for seed in range(20):
        rng, matcher = random.Random(seed), grammar.matcher()
        while not matcher.is_finished:
            single, tokens = matcher.clone(), []
            while taken := single.force(1, ()):
                tokens += taken
            most, checked = rng.choice([len(tokens), rng.randrange(1, 9)]), matcher.clone()
            for token in tokens[:most]:
                assert model.allowed(checked) == [token] and checked.accept([token])
            assert matcher.force(most, ()) == tokens[:most]
            assert model.allowed(matcher) == model.allowed(checked)
            together += most > 1
            assert matcher.accept([rng.choice(model.allowed(matcher))])
    assert together


@pytest.mark.parametrize("name", KINDS)
def test_branches_lead_to_whole_answers(name):
    """Trying a grammar out takes one way through it; a model may take any other."""
    model = vocabulary(name)
    texts = ["the red", " the", "x red", *"abcdefgh"]
    if name != "unigram":
        texts += ["x<|im_start|>y", "x<s>y", "n\u0303"]
    grammar = model.compile("choice", json.dumps(texts))
    wanted, seen = {text.encode() for text in texts}, set()
    for seed in range(1000):
        seen.add(model.follow(grammar.matcher(), seed))
        assert seen <= wanted
        if seen == wanted:
            break
    assert seen == wanted


def test_special_tokens_come_only_where_a_grammar_names_them():
    model = vocabulary("byte_level")
    special = model.tokenizer.special_ids
    matcher = model.compile("regex", r"(.|\n)*").matcher()
    assert special & set(model.allowed(matcher)) == {model.eos}
    start = model.tokenizer.token_id("<|im_start|>")
    for name in ("<|im_start|>", f"<[{start}]>"):
        matcher = model.compile("grammar", f'start: {name} /a?/ "<|im_start|>"').matcher()
        assert model.allowed(matcher) == [start] and matcher.accept([start])
        assert model.follow(matcher, 0) in (b"<|im_start|>", b"a<|im_start|>")


def test_added_tokens_are_text_but_in_grammars_that_can_name_them():
    model = vocabulary("byte_level")
    tool_call = model.tokenizer.token_id("<tool_call>")
    for kind, text in (("regex", ".*"), ("choice", '["<tool_call>"]')):
        assert tool_call in model.allowed(model.compile(kind, text).matcher())
    for start, named in (("/.*/", False), ('"<tool_call>"', False), ("<tool_call>", True)):
        matcher = model.compile("grammar", f"start: {start}").matcher()
        assert (tool_call in model.allowed(matcher)) == named
    # A text with a token in it is spelled out.
    matcher = model.compile("grammar", 'start: "a<tool_call>"').matcher()
    assert model.follow(matcher, 0) == b"a<tool_call>"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("choice", '["the red", "the ☃"]'),
        ("json_schema", '{"enum": ["the", "☃"]}'),
        ("json_schema", '{"type": "object", "properties": {"☃": {}}, "required": ["☃"]}'),
        ("regex", "the ☃"),
        ("json_object", ""),
    ],
)
def test_text_that_the_vocabulary_cannot_spell_is_refused(kind, text):
    with pytest.raises(InvalidRequest, match="this model's vocabulary can't spell"):
        vocabulary("unigram").compile(kind, text)


def test_tokens_that_share_their_bytes_may_all_come():
    model = vocabulary("byte_fallback")
    matcher = model.compile("regex", "[a-c]").matcher()
    both = {model.tokenizer.token_id("a"), model.tokenizer.token_id("<0x61>")}
    assert len(both) == 2 and both <= set(model.allowed(matcher))


OCR = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "lines": {"type": "array", "items": {"type": "string", "maxLength": 40}},
        "date": {"type": "string", "pattern": "^\\d{4}-\\d{2}$"},
        "kind": {"enum": ["Quittung", "reçu", "領収書"]},
    },
    "required": ["title", "lines", "date", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("escaped", [False, True], ids=["as it is", "with \\u escapes"])
def test_text_read_from_images_is_possible_under_a_schema(name, escaped):
    """Accents, CJK, quotes, line breaks and emoji, as models write JSON: as they are, or all as escapes."""
    model = vocabulary(name)
    answer = {
        "title": 'Café "Zum Löwen" – 喫茶店 😀',
        "lines": ["crème brûlée\t3,50 €", "l'été\\naïve", "日本語", "\u0007bell", ""],
        "date": "2024-05",
        "kind": "reçu",
    }
    text = json.dumps(answer, ensure_ascii=False)
    if escaped:
        kind = json.dumps(answer["kind"], ensure_ascii=False)
        text = json.dumps({**answer, "kind": 0}).replace('"kind": 0', f'"kind": {kind}')
    assert model.accepts(model.compile("json_schema", json.dumps(OCR)).matcher(), text)


STRINGS = [
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 9},
    {"anyOf": [{"const": "x"}, {"type": "string"}]},
    {"type": "object"},
    {},
]


@pytest.mark.parametrize("schema", STRINGS, ids=json.dumps)
def test_every_escape_that_can_be_begun_can_end_as_any_character(schema):
    model = vocabulary("byte_level")
    compiled = model.compile("json_schema", json.dumps(schema))
    for character in ("\\u00e9", "\\u0041", "\\u65E5", "\\ud83d\\ude00", "\\u0007", "\\n", '\\"'):
        text = f'{{"k": "{character}"}}' if schema == {"type": "object"} else f'"{character}"'
        assert model.accepts(compiled.matcher(), text), text
    # Half of a surrogate pair is no character.
    assert not model.accepts(compiled.matcher(), '"\\ud83d"')


@pytest.mark.parametrize("pattern", ["@", "^[^x]+$", ".*", "(?s).*", "\\S", "^[\\w\\s]+$"])
@pytest.mark.parametrize("where", ["pattern", "patternProperties"])
def test_no_escape_is_begun_that_a_pattern_would_bend(pattern, where):
    """Such strings can hold control characters, the only ones that llguidance would let ``\\u00`` become."""
    model = vocabulary("byte_level")
    schema = {"type": "string", "pattern": pattern}
    if where == "patternProperties":
        schema = {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": schema}, "required": ["a", "b"]}
    start = '{"a": "é\\n' if where == "pattern" else '{"a": "", "b": {"'
    backslash = model.tokenizer.token_id("\\")
    matcher = model.compile("json_schema", json.dumps(schema)).matcher()
    assert matcher.accept([i for c in start for i in model.tokenizer.encode_piece(c)])
    assert backslash not in model.allowed(matcher)
    rows = np.zeros((2, (model.size + 31) // 32), np.int32)
    matcher.fill_masks([(matcher, 0), (matcher.clone(), 1)], rows)
    assert (rows[0] == rows[1]).all() and not rows[0][backslash // 32] >> backslash % 32 & 1


def test_a_lone_backslash_comes_where_nothing_else_can():
    """Patterns and values that can't be written without an escape, in a vocabulary that has no whole ones."""
    model = vocabulary("byte_level")
    assert model.tokenizer.token_id('\\"') is None
    backslash = model.tokenizer.token_id("\\")
    matcher = model.compile("json_schema", json.dumps({"type": "string", "pattern": '^"+$'})).matcher()
    assert matcher.accept(model.tokenizer.encode_piece('"')) and model.allowed(matcher) == [backslash]
    schema = {"anyOf": [{"const": 'a"b'}, {"const": "ac"}, {"type": "string", "pattern": "^[^a].*$"}]}
    matcher = model.compile("json_schema", json.dumps(schema)).matcher()
    assert matcher.accept([i for c in '"a' for i in model.tokenizer.encode_piece(c)])
    assert backslash in model.allowed(matcher)


@pytest.mark.parametrize(
    ("token", "within"),
    [(b"\\", True), (b"\\\\", False), (b"a\\\\\\", True), (b'\\"', False), (b"\\n", False), (b"", False)],
)
def test_tokens_that_end_within_an_escape(token, within):
    assert within_escape(token) is within


TOOL = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "mood": {"enum": ['a "b"', "c"]}},
    "required": ["text"],
    "additionalProperties": False,
}
#: What stands before the name in calls that are numbered.
LEADS = {"cohere": '{"tool_call_id": "0'}


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_arguments_of_tools_may_hold_every_escape(name):
    """The schemas that a Lark grammar embeds have the escapes that a schema of its own has."""
    model, format_ = vocabulary("byte_level"), TOOL_FORMATS[name]
    tools = [ToolSchema("say", TOOL)]
    lark = tool_grammar(format_.layout, tools, SpecialTokens({}, frozenset()), choice="required")
    if "%json" not in lark or format_.layout.form is XML_CALL:
        pytest.skip("its strings are written without JSON")
    compiled = model.compile("grammar", lark)
    layout = format_.layout
    begin = f"{layout.trigger}{layout.opening}{LEADS.get(name, '')}{layout.form.head('say')}"
    begin += "text=" if layout.form is PYTHON_CALL else '{"text": '
    for character in ("\\u00e9", "\\u65E5", "\\ud83d\\ude00", "\\n", '\\"'):
        assert begins(model, compiled.matcher(), f'{begin}"{character}"'), character
    assert not begins(model, compiled.matcher(), f'{begin}"\\ud83d"')


def begins(model, matcher, text: str) -> bool:
    """Return whether an answer may begin with ``text``."""
    return matcher.accept([i for c in text for i in model.tokenizer.encode_piece(c)])


def test_schemas_of_a_lark_grammar_are_told_from_other_text():
    schema = '{"type": "string"}'
    plain = f'start: "%json {schema[:1]}" /[\\/"]%json {schema[:1]}/ TEXT // %json {schema}\nTEXT: "/" '
    plain += f'# "%json {schema}\n | '
    assert with_escapes(plain) == plain
    allowed = '{"type": "string", "x-guidance": {"json_allow_general_unicode_escapes": true}}'
    assert with_escapes(f"{plain}%json {schema} | %json\n{schema} /x/") == (
        f"{plain}%json {allowed} | %json\n{allowed} /x/"
    )
    short = '{"pattern": ".*", "x-guidance": {"json_allowed_escapes": "nrbtf\\\\\\""}}'
    assert with_escapes('start: %json {"pattern": ".*"}') == f"start: %json {short}"
    stated = 'start: %json {"x-guidance": {"json_allowed_escapes": "n"}}'
    assert with_escapes(stated) == stated
    assert with_escapes("start: %json {broken}") == "start: %json {broken}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ['"\\', "\\/", '\\"', "[a]", "[", "%json ", "%json {", '%json {"a":['])
@pytest.mark.parametrize("opening", ["start: /", 'start: "', "start: "])
def test_what_has_no_end_in_a_lark_grammar_is_read_once(opening, unit):
    """The time would grow with the square of the length to minutes, or double with each class."""
    lark = opening + unit * (MAX_STRUCTURED_TEXT // len(unit))
    assert with_escapes(lark) == lark


def test_a_schema_that_is_nested_too_deeply_is_left_to_the_compiler():
    lark = 'start: %json {"a": ' + "[" * 100_000
    assert with_escapes(lark) == lark


def test_a_value_that_needs_an_escape_has_it():
    model = vocabulary("byte_level")
    schema = {"type": "array", "prefixItems": [{"const": "\u0001"}, {"type": "string", "pattern": "\\S"}]}
    answer = '["\\u0001", "é"]'
    assert model.accepts(model.compile("json_schema", json.dumps(schema)).matcher(), answer)
