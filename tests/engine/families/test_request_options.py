"""Options of a request for its images: a low detail, and options up to their configured values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.families.base import AdjustableProcessor
from tests.engine.families.cases import case_named
from tests.engine.families.opened import media_processor
from tests.engine.tiny import picture

#: Of each family: a configuration, the same by a request's options, and options that it refuses.
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = [
    ("Qwen2-VL", {"max_pixels": 1024}, {"max_pixels": 1024}, [{"max_pixels": 1 << 40}, {"max_pixels": "9"}]),
    ("Qwen3-VL", {"max_pixels": 2048}, {"max_pixels": 2048, "min_pixels": None}, [{"num_crops": 1}]),
    ("Phi-3.5-vision", {"num_crops": 2}, {"num_crops": 2}, [{"num_crops": 65}, {"num_crops": True}]),
    ("MiniCPM-V 2.6", {"max_slice_nums": 2}, {"max_slice_nums": 2}, [{"max_slice_nums": 0}]),
    ("Idefics3", {"do_image_splitting": False}, {"do_image_splitting": False}, [{"do_image_splitting": 1}]),
    ("LLaVA-OneVision", {}, {}, [{"max_pixels": 1024}]),
    ("Command A Vision", {"max_patches": 2}, {"max_patches": 2}, [{"max_patches": 7}]),
    ("Molmo 2", {"max_crops": 2}, {"max_crops": 2}, [{"max_crops": 5}, {"max_crops": 0}]),
    ("Ovis2", {"max_patches": 2}, {"max_patches": 2}, [{"max_patches": 7}, {"crop_to_patches": 1}]),
]
LARGE = (300, 180)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made: dict[str, Any] = {}

    def find(name: str):
        if name not in made:
            case = case_named(name)
            made[name] = tmp_path_factory.mktemp("options")
            case.make(made[name], False)
        return made[name]

    return find


@pytest.mark.parametrize(("name", "configured", "asked", "refused"), ROWS, ids=[row[0] for row in ROWS])
def test_options_of_a_request_are_those_of_the_configuration(path, name, configured, asked, refused):
    ours = media_processor(path(name))
    assert isinstance(ours, AdjustableProcessor)
    image = picture(*LARGE)
    wanted = media_processor(path(name), **configured).prepare(image)
    given = ours.with_options(asked).prepare(image)
    assert given.item == wanted.item
    assert (given.pixels == wanted.pixels).all()
    if configured:
        assert given.item.hash != ours.prepare(image).item.hash
    for options in refused:
        with pytest.raises(InvalidRequest, match=r"^mm_processor_kwargs\.") as error:
            ours.with_options(options)
        assert error.value.param == f"mm_processor_kwargs.{next(iter(options))}"


@pytest.mark.parametrize("name", [row[0] for row in ROWS])
def test_low_detail_costs_less(path, name):
    ours, large = media_processor(path(name)), picture(1400, 900)
    if name.startswith("Qwen"):
        # The tiny checkpoint's own bound is below that of a low detail.
        ours = replace(ours, pixels=(64, 1 << 21))
        assert ours.low_detail().check(large.size) <= 512 * 512 // ours.factor**2
    low = ours.low_detail()
    assert low.prepare(large).item.num_tokens == low.check(large.size) < ours.check(large.size)
