"""Whole prompts of real families: our ids, placeholders included, are those of Transformers' processors."""

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from engine.checkpoint.folder import Checkpoint
from engine.families.registry import resolve
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.messages import parse_messages
from engine.text.tokenizer import Tokenizer
from tests.engine import tiny

PICTURES = [tiny.picture(64, 40, 1), tiny.picture(50, 90, 2), tiny.picture(9, 30, 3)]


def llava_processor(path):
    return transformers.LlavaProcessor.from_pretrained(path, backend="pil")


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen2_vl":
        tiny.make_qwen2_vl(path)
        reference = tiny.reference_processor(path)
    else:
        tiny.make_llava(path)
        reference = llava_processor(path)
    checkpoint = Checkpoint.open(str(path))
    family = resolve(checkpoint)
    config = family.parse(checkpoint)
    tokenizer = Tokenizer.load(path)
    default = family.prompt_format(config).default_template
    template = ChatTemplate.load(path, tokenizer.config, None, default)
    builder = PromptBuilder.for_model(family, config, tokenizer, template)
    source = PreTrainedTokenizerFast.from_pretrained(path).chat_template or default
    return builder, family.media_processor(checkpoint, config, {}), reference, source


CONVERSATIONS = [
    [("user", [0, "what is this?"])],
    [
        ("system", ["be kind"]),
        ("user", ["see ", 0, "and ", 1]),
        ("assistant", ["a red\nsquare"]),
        ("user", [2, "ok?"]),
    ],
    [("user", ["only words: 你好 😀"])],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_those_of_the_processor(model, conversation):
    builder, processor, reference, source = model

    def messages(picture):
        def part(given):
            return {"type": "text", "text": given} if isinstance(given, str) else picture(given)

        return [{"role": role, "content": [part(given) for given in parts]} for role, parts in conversation]

    parsed, sources = parse_messages(messages(lambda p: {"type": "image", "image": PICTURES[p]}))
    ours = builder.from_messages(parsed, [processor.prepare(s.image).item for s in sources])
    rendered = reference.apply_chat_template(
        messages(lambda p: {"type": "image"}), chat_template=source, add_generation_prompt=True
    )
    assert ours.text == rendered
    pictures = [source.image for source in sources]
    wanted = reference(text=[rendered], images=pictures or None)["input_ids"][0]
    assert ours.token_ids == list(map(int, wanted))
    again = builder.from_text(rendered, [span.item for span in ours.spans])
    assert again.token_ids == ours.token_ids
    assert builder.from_token_ids(ours.token_ids, [span.item for span in ours.spans]).spans == ours.spans
