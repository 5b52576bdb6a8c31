"""Tests of DeepSeek-VL alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import pytest

from engine.errors import CheckpointError
from tests.engine.families.deepseek_vl import make_deepseek_vl
from tests.engine.families.opened import check_refused, copy_json, parse


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_deepseek_vl(tmp_path_factory.mktemp("deepseek_vl"), hub=True)


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"text_config": {"model_type": "qwen2"}}, "text_config"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "size"),
        ("preprocessor_config.json", {"size": None}, "size"),
        ("preprocessor_config.json", {"min_size": 0}, "min_size"),
        ("preprocessor_config.json", {"min_size": 22}, "min_size"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"do_pad": False}, "do_pad"),
        ("processor_config.json", {"num_image_tokens": 16}, "num_image_tokens"),
    ],
    ids=str,
)
def test_files_that_are_not_supported_are_refused_by_name(path, tmp_path, file, fields, param):
    copy_json(path, tmp_path)
    check_refused(tmp_path, file, fields, param)


def test_the_head_of_the_tower_is_not_read(path):
    _, config = parse(path)
    assert config.vision.tower.post_norm and config.vision.rows_per_crop == 9
    assert config.decoder.tie_word_embeddings


def test_the_hybrid_of_two_towers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["DeepseekVLHybridForConditionalGeneration"]}')
    with pytest.raises(CheckpointError, match="DeepseekVLHybridForConditionalGeneration is not supported"):
        parse(tmp_path)
