import json

import pytest
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.template_sandbox import RenderLimits
from tests.engine.inputs import templates

TEXT = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "a </think> b  "}]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "what"}, {"type": "image"}, {"type": "text", "text": "?"}],
    },
]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "<b>é&</b>"}}


def template(source, **limits):
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}, RenderLimits(**limits))


@pytest.fixture(scope="module")
def reference(checkpoints):
    return PreTrainedTokenizerFast.from_pretrained(checkpoints["byte_fallback"])


@pytest.mark.parametrize(
    ("source", "messages", "options"),
    [
        (templates.CHATML_PARTS, PARTS, {}),
        (templates.CHATML_PARTS, TEXT, {}),
        (templates.LLAVA, PARTS, {"add_generation_prompt": False}),
        (templates.PHI, TEXT, {}),
        (templates.CHATML_TRIMMED, TEXT, {}),
        (templates.TOOLS, TEXT, {"tools": [WEATHER]}),
        (templates.TOOLS, TEXT, {"options": {"enable_thinking": False, "unheard": 1}}),
        (templates.MACRO, PARTS, {}),
        (templates.ALIAS, PARTS, {}),
        ("{{ bos_token }}{{ eos }}"
         "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} "
         "{{ m.content if loop.first else '-' * 3 }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
         TEXT, {}),
        ("{% if messages %}\n x{% generation %}y{{ messages[0].content }}{% endgeneration %}\n{% endif %}\n",
         TEXT, {}),
        ("{% for m in messages recursive %}{{ m.role }}{% else %}none{% endfor %}", TEXT, {}),
    ],
)  # fmt: skip
def test_text_is_that_of_transformers(reference, source, messages, options):
    ours = template(source).render(messages, **options)
    options = dict(options)
    theirs = reference.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=options.pop("add_generation_prompt", True),
        tools=options.pop("tools", None),
        **options.pop("options", {}),
    )
    assert ours == theirs


@pytest.mark.parametrize("source", [templates.PHI, templates.CHATML_TRIMMED, templates.CHATML_PARTS])
def test_continued_message_is_that_of_transformers(reference, source):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours = template(source).render(TEXT, **options)
    assert ours == reference.apply_chat_template(TEXT, chat_template=source, tokenize=False, **options)


def test_a_part_is_continued():
    source = templates.CHATML_PARTS
    text = template(source).render(PARTS, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|vision_end|>?")
    with pytest.raises(InvalidRequest, match="exclude"):
        template(source).render(PARTS, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text"):
        template(source).render(
            [{"role": "user", "content": [{"type": "image"}]}],
            add_generation_prompt=False,
            continue_final_message=True,
        )


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ [1] * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ '%099999999999d' % 1 }}",
        "{% for i in range(2000) %}{{ 'a' * 10000 }}{% endfor %}",
    ],
)
def test_endless_rendering_is_stopped(source):
    with pytest.raises(InvalidRequest):
        template(source, steps=20_000).render(TEXT)


def test_rendering_is_stopped_at_its_deadline():
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="0 seconds"):
        template(source, steps=10**12, seconds=0).render(TEXT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(InvalidRequest):
        template(source).render(TEXT)


def test_refusals_and_errors_are_reported():
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(TEXT)
    with pytest.raises(InvalidRequest, match="TypeError"):
        template("{{ messages[0].content + 1 }}").render(TEXT)
    with pytest.raises(InvalidRequest, match="no element 9"):
        template("{{ messages[9].content }}").render(TEXT)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "bos_token", "raise_exception"])
def test_options_that_no_caller_may_set(name):
    with pytest.raises(InvalidRequest, match=name) as caught:
        template(templates.PHI).render(TEXT, options={name: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_where_templates_are_found(tmp_path):
    def found(config=None, **options):
        loaded = ChatTemplate.load(tmp_path, config or {}, **options)
        return None if loaded is None else loaded.render([{"role": "user", "content": "x"}])

    assert found() is None
    assert found(default="family") == "family"
    assert found({"chat_template": "config"}, default="family") == "config"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two {{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>"}}
    assert found(config) == "one"
    assert ChatTemplate.load(tmp_path, config).render(TEXT, tools=[WEATHER]) == "two </s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert found(config) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert found(config) == "jinja"
    (tmp_path / "other.jinja").write_text("other")
    assert found(config, override=tmp_path / "other.jinja") == "other"
    assert found(config, override=str(tmp_path / "other.jinja")) == "other"
    assert found(config, override="literal {{ 1 }}") == "literal 1"


def test_templates_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="neither a file") as caught:
        ChatTemplate.load(tmp_path, {}, override="missing.jinja")
    assert caught.value.param == "chat_template"
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate.load(tmp_path, {}, override="{{ 1 }}\n{% for %}")
    with pytest.raises(ConfigError, match="default"):
        ChatTemplate.load(tmp_path, {"chat_template": [{"name": "rag", "template": ""}]})
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"chat_template\.json"):
        ChatTemplate.load(tmp_path, {})
