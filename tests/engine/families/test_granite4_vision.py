"""Tests of Granite 4 Vision alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import math
import random

import pytest
import transformers

from tests.engine.families.granite4_vision import HAS_GRANITE4_VISION
from tests.engine.families.opened import media_processor, parse

pytestmark = pytest.mark.skipif(
    not HAS_GRANITE4_VISION, reason="this release of Transformers has no Granite 4 Vision"
)

_SIDE = 384
_PINPOINTS = [[_SIDE * down, _SIDE * along] for down in range(1, 11) for along in range(1, 10 // down + 1)]
#: A tower and a decoder of the sizes of Granite 4.0 3B Vision.
PUBLIC = {
    "architectures": ["Granite4VisionForConditionalGeneration"],
    "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
    "downsample_rate": "4/8",
    "image_grid_pinpoints": _PINPOINTS,
    "image_token_index": 100352,
    "model_type": "granite4_vision",
    "spatial_target_layers": [12, 15, 18, 21],
    "spatial_vision_layer": -1,
    "text_config": {
        "model_type": "granite4_vision_text",
        "embedding_multiplier": 12.0,
        "hidden_size": 2560,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "vocab_size": 100353,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": _SIDE,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 16,
    },
    "vision_feature_select_strategy": "full",
}


@pytest.fixture
def public(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    sizes = {"size": {"height": _SIDE, "width": _SIDE}, "crop_size": {"height": _SIDE, "width": _SIDE}}
    stated = {"image_grid_pinpoints": _PINPOINTS, **sizes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    return tmp_path


def test_rows_have_a_part_for_each_layer_that_gets_features(public):
    _, parsed = parse(public)
    windows = parsed.vision.crops.windows
    assert parsed.embedding_width == parsed.vision.crops.out_features == 8 * 2560
    assert parsed.decoder.deepstack_layers == (2, 5, 8, 11, 14, 17, 20)
    assert not parsed.decoder.multiplies_rows and parsed.decoder.embedding_multiplier == 12.0
    # Behind blocks 9, 15, 21 and 27 of 27, which layers 9, 6, 3 and 0 get.
    assert parsed.vision.crops.tower.features == (9, 15, 21, 27, 27)
    assert windows.order == (3, 2, 1, 0, 4, 5, 6, 7) and (windows.side, windows.num_heads) == (4, 18)
    assert (windows.num_blocks, windows.intermediate_size) == (1, 3072)


def test_numbers_of_rows_are_those_of_transformers(public):
    ours, draw = media_processor(public), random.Random("rows")
    theirs = object.__new__(transformers.Granite4VisionProcessor)
    theirs.patch_size, theirs.downsample_rate, theirs.num_additional_image_tokens = 16, "4/8", 0
    theirs.image_processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=_PINPOINTS)
    for _ in range(200):
        width, height = (round(math.exp(draw.uniform(1, math.log(4000)))) for _ in range(2))
        expected = theirs._get_number_of_features(height, width, _SIDE, _SIDE)
        assert ours.check((width, height)) == expected, (width, height)
