"""Tests of MiniCPM-OCR alone; ``test_laws.py`` compares whole answers of all families."""

import pytest
import torch

from engine.errors import ConfigError
from tests.engine.families.minicpm_v4_6 import OCR, image_options, make_minicpm_v4_6, pil_processor
from tests.engine.families.opened import media_processor
from tests.engine.tiny import picture

SIZES = [(1, 1), (5, 9), (24, 24), (20, 31), (25, 23), (7, 80), (3, 200), (60, 44), (90, 91), (400, 30)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_minicpm_v4_6(tmp_path_factory.mktemp("minicpm_ocr"), True, OCR)


@pytest.mark.parametrize("mode", ["always", "never", None])
def test_pieces_of_images_are_those_of_transformers(path, mode):
    """Where the option is not given, the file leaves it out as well."""
    options = {} if mode is None else {"small_image_upsize": mode}
    ours, theirs = media_processor(path, **options), pil_processor(image_options(path) | options, OCR)
    different = set()
    for size in SIZES:
        made = theirs([picture(*size)], return_tensors="pt")
        media = ours.prepare(picture(*size))
        assert ours.check(size) == media.item.num_tokens
        assert media.item.num_tokens == int(torch.as_tensor(made["target_sizes"]).prod(-1).sum()) // 4
        different.add(media.item.num_tokens)
    assert len(different) > 4


def test_another_mode_is_refused_by_name(path):
    with pytest.raises(ConfigError) as error:
        media_processor(path, small_image_upsize="adaptive")
    assert error.value.param == "mm_processor_kwargs.small_image_upsize"
