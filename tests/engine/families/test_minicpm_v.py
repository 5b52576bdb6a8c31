"""Tests of MiniCPM-V alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.vision_utils import get_vision_nearest_position_ids

from engine import LLM, SamplingParams
from engine.errors import ConfigError, InvalidRequest
from engine.families.minicpm_v.family import FAMILY
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.messages import parse_messages
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from engine.text.tokenizer import Tokenizer
from engine.vision.bucketed_positions import bucketed_positions
from tests.engine.families import minicpm_v_reference as composed
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.minicpm_v_reference import IMAGE
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import picture, rewrite_json, rewrite_tensors

PARAMS = SamplingParams(temperature=0.0, max_tokens=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return composed.make(tmp_path_factory.mktemp("minicpm_v"), seed=2)


@pytest.mark.parametrize("version", [4.0, 4.5])
def test_later_versions_answer_as_their_references_do(tmp_path, version):
    """Version 4.0 is Llama with longrope, as the public checkpoint is; version 4.5 is Qwen3."""
    rope = {"rope_type": "longrope", "short_factor": [1.1] * 32, "long_factor": [1.5] * 32}
    rope["original_max_position_embeddings"] = 2048
    fields = {4.0: {"rope_scaling": {**rope, "factor": 1.0}}, 4.5: {"head_dim": 32}}[version]

    def make(path, hub):
        composed.make(path, version=version, **fields)

    model = Made(replace(case_named("MiniCPM-V 2.6"), make=make), tmp_path / "made")
    model.check_all()
    # The tokenizer has no </s>, which ends answers of 4.0, but <|endoftext|>, which ends those of 4.5.
    assert parse(model.path)[1].eos_token_ids == {4.0: (2,), 4.5: (2, 0)}[version]


def test_rows_are_those_of_the_reference_alone_and_together(path):
    """One image has 49 patches in a line, whose positions depend on the rounding of fractions."""
    sizes = [(60, 44), (20, 24), (150, 24), (28, 140), (343, 2)]
    pictures = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    model, ours, prepare = composed.load(path), encoder(path), media_processor(path).prepare
    media = [prepare(image) for image in pictures]
    assert media[-1].item.grid[:2] == (1, 49)
    together = ours.encode(media)
    for image, entry, rows in zip(pictures, media, together, strict=True):
        with torch.inference_mode():
            wanted = torch.cat([model.rows(piece) for piece in composed.cut(image)[0]])
        torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.encode([entry])[0], rows, atol=1e-5, rtol=0)
        assert ours.cost(entry.item) == len(entry.pixels)


def test_buckets_are_exact_but_for_fractions_on_a_bound():
    """Rounding may put a patch that begins on a bound into the bucket before it, as it did in training."""
    moved = {}
    for count in range(1, 453):
        for index, bucket in enumerate(bucketed_positions(1, count, 70, fractions="range").tolist()):
            exact, rest = divmod(index * 70, count)
            if bucket != exact:
                assert (rest, bucket) == (0, exact - 1)
                moved.setdefault(count, []).append(index)
    assert [count for count in moved if count <= 72] == [25, 49, 50, 55, 58]
    assert moved[25] == [5, 10, 15, 20]
    rows = bucketed_positions(25, 3, 70, fractions="range").view(25, 3)
    assert rows[5].tolist() == [13 * 70, 13 * 70 + 23, 13 * 70 + 46]


def test_buckets_of_version_4_6_are_those_of_transformers():
    for height, width in ((1, 452), (25, 3), (49, 50), (72, 58)):
        sizes = torch.tensor([[height, width]])
        wanted = get_vision_nearest_position_ids(sizes, 70)
        assert torch.equal(bucketed_positions(height, width, 70, fractions="quotients"), wanted)


def test_chat_messages_and_expanded_ids(path):
    config = parse(path)[1]
    tokenizer = Tokenizer.load(path)
    template = ChatTemplate.load(path, tokenizer.config, None, FAMILY.prompt_format(config).default_template)
    builder = PromptBuilder.for_model(FAMILY, config, tokenizer, template)
    images = [picture(60, 44), picture(20, 24, 1)]
    content = [
        {"type": "image", "image": images[0]},
        {"type": "text", "text": "a red " + IMAGE + "<slice>"},
        {"type": "image", "image": images[1]},
    ]
    messages, sources = parse_messages([{"role": "user", "content": content}])
    items = [media_processor(path).prepare(source.image).item for source in sources]
    ours = builder.from_messages(messages, items)
    assert ours.text == FRAME.format(f"{IMAGE}\na red {IMAGE}<slice>\n{IMAGE}")
    assert [item.size for item in items] == [span.item.size for span in ours.spans] == [(60, 44), (20, 24)]
    assert ours.token_ids.count(composed.SPECIALS.index("<slice>")) == 4
    plain = builder.from_text(FRAME.format(f"{IMAGE}\nand\n{IMAGE}"), items)
    assert plain.token_ids == composed.prompt_ids(path, FRAME.format(f"{IMAGE}\nand\n{IMAGE}"), images)
    assert len(plain.spans[0].embed_index) == items[0].num_tokens
    again = builder.from_token_ids(plain.token_ids, items)
    assert [(s.offset, s.length) for s in again.spans] == [(s.offset, s.length) for s in plain.spans]


def test_options_of_the_processor(path, tmp_path):
    image, prompt = picture(90, 80), FRAME.format(IMAGE)
    assert media_processor(path, max_slice_nums=4).grid(image.size)[2:4] == (2, 2)
    assert media_processor(path, max_slice_nums=1).check(image.size) == composed.QUERIES
    llm = LLM(str(path), max_model_len=400, mm_processor_kwargs={"max_slice_nums": 4})
    entry = {"prompt": prompt, "multi_modal_data": {"image": image}}
    (output,) = llm.generate(entry, PARAMS, use_tqdm=False)
    assert output.prompt_token_ids == composed.prompt_ids(path, prompt, [image], limit=4)
    composed.make(tmp_path)
    rewrite_json(tmp_path / "preprocessor_config.json", {"use_image_id": False})
    (output,) = LLM(str(tmp_path), max_model_len=400).generate(entry, PARAMS, use_tqdm=False)
    assert output.prompt_token_ids == composed.prompt_ids(tmp_path, prompt, [image], numbered=False)


def test_refusals(path):
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="not videos"):
        ours.prepare_video(Video.of([picture(8, 8)]))
    for options in ({"num_crops": 3}, {"max_slice_nums": 0}, {"max_slice_nums": True}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            media_processor(path, **options)
    media = ours.prepare(picture(60, 44))
    for pixels in (media.pixels[:-1], media.pixels.astype("float32"), media.pixels[:, :2]):
        with pytest.raises(InvalidRequest, match="grid"):
            encoder(path).encode([PreparedMedia(media.item, pixels)])


def test_towers_saved_without_their_last_layer(tmp_path):
    """Without drop_vision_last_layer in config.json the tower has one layer less than stated."""
    path = composed.make(tmp_path)
    rewrite_json(path / "config.json", {"drop_vision_last_layer": None})
    rewrite_tensors(
        path, lambda tensors: {k: v for k, v in tensors.items() if ".layers.1." not in k or "llm" in k}
    )
    assert len(encoder(path).tower.blocks) == 1
