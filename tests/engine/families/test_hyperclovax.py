"""Tests of HyperCLOVA X alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from engine.errors import CheckpointError
from engine.families.hyperclovax_vision_v2.family import FAMILY
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.messages import parse_messages
from engine.media.video.video import Pace, Video, VideoInfo
from engine.parsers.formats import reasoning_tags_of, tool_format_of
from engine.text.tokenizer import Tokenizer
from tests.engine.families.opened import media_processor, parse
from tests.engine.families.qwen import HAS_HYPERCLOVAX, Reference, frames, make_hyperclovax
from tests.engine.tiny import rewrite_json

needs_transformers = pytest.mark.skipif(
    not HAS_HYPERCLOVAX, reason="this release of Transformers has no HyperCLOVA X with images"
)
CONFIG = {
    "architectures": ["HCXVisionV2ForCausalLM"],
    "model_type": "vlm",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "hyperclovax",
        "vocab_size": 128256,
        "hidden_size": 5120,
        "intermediate_size": 24192,
        "num_hidden_layers": 72,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 5e7,
        "attention_multiplier": 128**-0.5,
        "logits_scaling": 0.125,
        "embedding_multiplier": 10.0,
    },
    "vision_config": {"model_type": "qwen2_5_vl", "out_hidden_size": 5120},
}
#: In the manner of the public file: what is known of a video comes before its place.
TEMPLATE = (
    "{% if tools %}<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n</tool_call>"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}"
    '{"video_duration": <|video_duration|>}\n<|vision_start|><|video_pad|><|vision_end|>'
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% if not thinking %}\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def test_a_configuration_of_public_sizes_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    decoder = parse(tmp_path)[1].decoder
    assert (decoder.logits_multiplier, decoder.logits_divisor, decoder.residual_multiplier) == (0.125, 1, 1)
    assert decoder.sandwich and not decoder.tie_word_embeddings and decoder.max_position == 131072


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio_config": {"d_model": 8}}, "audio_config"),
        ({"discrete_vision_config": {"model_type": "ta_tok"}}, "discrete_vision_config"),
        ({"text_config": {"model_type": "llama"}}, "text_config"),
        ({"text_config": {"use_post_norm": "yes"}}, "use_post_norm"),
        ({"vision_config": {"out_hidden_size": 0}}, "out_hidden_size"),
    ],
)
def test_files_that_are_not_supported_are_refused_by_name(tmp_path, fields, param):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rewrite_json(tmp_path / "config.json", fields)
    with pytest.raises(CheckpointError) as refused:
        parse(tmp_path)
    assert refused.value.param == param


def test_its_template_tells_the_formats_of_calls_and_thoughts():
    found = tool_format_of(TEMPLATE)
    assert found is not None and found.name == "glm"
    assert reasoning_tags_of(TEMPLATE).end == "</think>"


@needs_transformers
def test_the_duration_of_each_video_is_told_as_by_transformers(tmp_path):
    make_hyperclovax(tmp_path)
    _, config = parse(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate.load(tmp_path, tokenizer.config, TEMPLATE)
    builder = PromptBuilder.for_model(FAMILY, config, tokenizer, template)
    # Of a file with another rate, and frames without any.
    info = VideoInfo(frames=77, fps=30000 / 1001, size=(40, 56))
    paces = Pace.of_indices([0, 30, 60], info), None
    metadata = [
        VideoMetadata(total_num_frames=77, fps=info.fps, duration=info.duration, frames_indices=[0, 30, 60]),
        VideoMetadata(total_num_frames=3, frames_indices=[0, 1, 2]),
    ]
    ours = media_processor(tmp_path)
    items = [ours.prepare_video(Video.of(frames(3), pace)).item for pace in paces]
    # What a caller types in the words of the template is text.
    typed = "is <|video_duration|> long?"
    video = {"type": "video", "video": frames(3)}
    content = [video, {"type": "text", "text": typed}, video]
    parsed, _ = parse_messages([{"role": "user", "content": content}])
    built = builder.from_messages(parsed, items)
    processor = Reference(tmp_path, "HyperCLOVAXVisionV2").processor
    processor.video_processor = lambda videos: {"video_metadata": metadata}
    processor.replace_video_token = lambda processed, video_idx: "<|video_pad|>" * items[video_idx].num_tokens
    clip = torch.zeros(3, 3, 4, 4)
    _, rows = processor._process_videos([[clip], [clip]])
    rendered = template.render(
        [{"role": "user", "content": content}],
        tools=None,
        options={},
        add_generation_prompt=True,
        continue_final_message=False,
    )
    wanted = processor.get_text_with_replacements([rendered.replace(typed, "TYPED")], [], rows)[0][0]
    assert '"video_duration": 2.57}' in wanted and '"video_duration": 0.12}' in wanted
    assert tokenizer.decode(built.token_ids) == wanted.replace("TYPED", typed)
    assert typed in built.text and built.text.count("<|video_duration|>") == 1
    raw = builder.from_text(rendered.replace(typed, "how long?"), items)
    assert [span.item for span in raw.spans] == items and "<|video_duration|>" not in raw.text
    # Marks without a video stay.
    assert "<|video_duration|>" in builder.from_text(rendered.split("<|vision_start|>")[0]).text


@needs_transformers
def test_transformers_reads_the_publishers_configuration_alike():
    theirs = transformers.HyperCLOVAXVisionV2Config(**{**CONFIG, "architectures": None})
    assert (theirs.image_token_id, theirs.video_token_id) == (128060, 128061)
    assert theirs.vision_config.model_type == "qwen2_5_vl_vision" and theirs.text_config.use_post_norm
