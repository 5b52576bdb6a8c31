"""Tests of Gemma 3 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random

import pytest

from engine import LLM, SamplingParams
from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.registry import family_named, resolve
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.messages import parse_messages
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from engine.text.tokenizer import Tokenizer
from tests.engine.families.gemma3 import (
    FRAME,
    IMAGE,
    Gemma3Reference,
    image_processor_class,
    make_gemma3,
)
from tests.engine.families.opened import check_refused, encoder, media_processor, parse
from tests.engine.inputs import templates
from tests.engine.tiny import picture

#: As gemma-3-4b-it states it.
PUBLIC = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
SIZE = {"height": 896, "width": 896}


@pytest.fixture
def public(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Gemma3ImageProcessor", "size": SIZE, "do_pan_and_scan": None})
    )
    return tmp_path


def test_public_configuration_is_filled_up(public):
    _, parsed = parse(public)
    decoder = parsed.decoder
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (8, 4, 256)
    assert decoder.windows[:7] == (1024,) * 5 + (None, 1024) and decoder.tie_word_embeddings
    assert decoder.both_ways == "images" and decoder.vocab_size == 262208
    assert parsed.vision.rows_per_crop == 256 and parsed.vision.averaged == 4
    assert parsed.eos_token_ids == (1, 106)


def test_2000_sizes_have_the_parts_of_transformers(public):
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_max_num_crops": 5,
        "pan_and_scan_min_crop_size": 100,
        "pan_and_scan_min_ratio_to_activate": 1.3,
    }
    ours, plain = media_processor(public, **options), media_processor(public)
    theirs = image_processor_class()(size=SIZE)
    drawn = random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (4000, 100), (500, 100), (199, 100), (200, 100), (130, 100)]
    sizes += [(drawn.randint(1, 1500), drawn.randint(1, 1500)) for _ in range(2000)]
    given = {name: value for name, value in options.items() if name != "do_pan_and_scan"}
    for width, height in sizes:
        wanted = theirs.pan_and_scan(_Shape(height, width), **given)
        assert ours.check((width, height)) == 256 * (1 + len(wanted)), (width, height)
        boxes = [(right - left, bottom - top) for left, top, right, bottom in ours._parts((width, height))]
        assert boxes == [(part.width, part.height) for part in wanted], (width, height)
        assert plain.check((width, height)) == 256


class _Shape:
    """An array ``(3, height, width)`` that has a shape only."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.shape = 3, height, width

    def __getitem__(self, ranges: tuple[slice, slice, slice]) -> _Shape:
        _, rows, columns = ranges
        return _Shape(len(range(*rows.indices(self.height))), len(range(*columns.indices(self.width))))


def test_the_image_processors_own_pan_and_scan_counts_for_nothing_as_in_transformers(tmp_path):
    make_gemma3(tmp_path, hub=True)
    file = tmp_path / "preprocessor_config.json"
    stated = json.loads(file.read_text()) | {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
    file.write_text(json.dumps(stated))
    reference = Gemma3Reference(tmp_path)
    made = reference.processor(text=IMAGE, images=[picture(90, 20)], return_tensors="pt")
    assert len(made["pixel_values"]) == media_processor(tmp_path).prepare(picture(90, 20)).item.grid[0] == 1


GEMMA = templates.GEMMA.replace("<|image_pad|>", IMAGE)
CONVERSATIONS = [
    [("user", [0, "what is this?"])],
    [("user", ["\n\nsee\n", 0, "\n\nand ", 1, 2]), ("assistant", ["a red\nsquare"]), ("user", [3, "ok?"])],
    [("system", ["be kind\n"]), ("user", [0, "\n\n", 1, "so?"])],
    [("user", ["only words\n\n"])],
]
PICTURES = [picture(64, 40, 1), picture(50, 90, 2), picture(9, 30, 3), picture(20, 20, 4)]


@pytest.mark.parametrize("options", [{}, {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 9}])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_those_of_the_processor(tmp_path, conversation, options):
    """Line feeds around images join those of the text beside them."""
    make_gemma3(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    family = resolve(checkpoint)
    config, tokenizer = family.parse(checkpoint), Tokenizer.load(tmp_path)
    template = ChatTemplate.load(tmp_path, tokenizer.config, GEMMA, None)
    builder = PromptBuilder.for_model(family, config, tokenizer, template)
    processor = family.media_processor(checkpoint, config, options)
    reference = Gemma3Reference(tmp_path).processor

    def messages(image):
        def part(given):
            return {"type": "text", "text": given} if isinstance(given, str) else image(given)

        return [{"role": role, "content": [part(given) for given in parts]} for role, parts in conversation]

    parsed, sources = parse_messages(messages(lambda i: {"type": "image", "image": PICTURES[i]}))
    ours = builder.from_messages(parsed, [processor.prepare(source.image).item for source in sources])
    rendered = reference.apply_chat_template(
        messages(lambda i: {"type": "image"}), chat_template=GEMMA, add_generation_prompt=True
    )
    images = [source.image for source in sources]
    wanted = reference(text=[rendered], images=images or None, **options)["input_ids"][0]
    assert ours.token_ids == list(map(int, wanted))
    items = [span.item for span in ours.spans]
    assert builder.from_text(rendered, items).token_ids == ours.token_ids
    again = builder.from_token_ids(ours.token_ids, items)
    assert [span.runs() for span in again.spans] == [span.runs() for span in ours.spans]


def test_an_image_that_no_step_holds_is_refused_by_what_to_change(tmp_path):
    make_gemma3(tmp_path)
    llm = LLM(str(tmp_path), max_model_len=128, max_num_batched_tokens=8)
    entry = {"prompt": FRAME.format(IMAGE), "multi_modal_data": {"image": picture(30, 30)}}
    with pytest.raises(InvalidRequest, match=r"9 tokens .*max_num_batched_tokens is 8"):
        llm.generate(entry, SamplingParams(max_tokens=2), use_tqdm=False)
    (output,) = llm.generate(FRAME.format("hello"), SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    llm.check_integrity()


def test_options(tmp_path):
    make_gemma3(tmp_path)
    wide = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 9}
    ours, image = media_processor(tmp_path, **wide), picture(90, 20)
    assert ours.prepare(image).item.grid == (5,)
    assert ours.low_detail().prepare(image).item.grid == (1,)
    fewer = ours.with_options({"pan_and_scan_max_num_crops": 2}).prepare(image)
    assert fewer.item == media_processor(tmp_path, **wide, pan_and_scan_max_num_crops=2).prepare(image).item
    for options in ({"pan_and_scan_max_num_crops": 5}, {"do_pan_and_scan": 1}, {"num_crops": 1}):
        with pytest.raises(InvalidRequest, match=rf"mm_processor_kwargs\.{next(iter(options))}"):
            ours.with_options(options)
    with pytest.raises(InvalidRequest, match="must be false"):
        media_processor(tmp_path).with_options({"do_pan_and_scan": True})
    for name, value in {"do_pan_and_scan": 1, "pan_and_scan_min_ratio_to_activate": 0.5}.items():
        with pytest.raises(ConfigError, match=name):
            media_processor(tmp_path, **{name: value})


def test_refusals(tmp_path):
    path = make_gemma3(tmp_path)
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="not videos"):
        ours.prepare_video(Video.of([picture(8, 8)]))
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:, :-1])])


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"mm_tokens_per_image": 8}, "mm_tokens_per_image"),
        ("config.json", {"mm_tokens_per_image": 16}, "mm_tokens_per_image"),
        ("preprocessor_config.json", {"size": {"height": 30, "width": 20}}, "size"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("processor_config.json", {"image_seq_length": 4}, "image_seq_length"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, file, fields, param):
    check_refused(make_gemma3(tmp_path, hub=True), file, fields, param)


def test_a_tokenizer_without_the_tokens_of_images_is_refused(tmp_path):
    make_gemma3(tmp_path)
    item, (_, config) = media_processor(tmp_path).prepare(picture(30, 30)).item, parse(tmp_path)
    with pytest.raises(CheckpointError, match="<start_of_image> and <end_of_image>"):
        family_named("gemma3").placeholder(config, item, 0, lambda text: [40, 41])
