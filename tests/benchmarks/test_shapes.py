"""The shapes of the benchmarks are those of public models, and can be served."""

import pytest
import torch

from benchmarks.shapes import SHAPES, write_checkpoint, write_configuration
from engine.config import EngineConfig
from engine.distributed.group import SingleProcessGroup
from engine.families.registry import family_named
from engine.frontend import Frontend
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from tests.engine.families.opened import media_processor, parse
from tests.engine.tiny import picture

#: Rows of the benchmark's image, and millions of parameters that are used, of the published checkpoints: a
#: tower's layers behind the last one used and heads of towers are left out.
SIZES = {
    "tiny": (16, 10),
    "tiny-qwen3.5": (16, 10),
    "qwen2-vl-2b": (400, 2209),
    "qwen2-vl-7b": (400, 8291),
    "llava-1.5-7b": (576, 7051),
    "aya-vision-8b": (169, 8632),
    # By its configuration.
    "ernie-4.5-vl-28b-a3b": (400, 29399),
    "exaone-4.5-33b": (400, 33873),
    "hyperclovax-seed-think-32b": (400, 33310),
    "muse-glimmer-30b": (400, 29777),
    "gemma-3-4b": (256, 4300),
    "glm-4.1v-9b": (400, 10293),
    "hunyuan-ocr-1b": (344, 996),
    "internvl3-2b": (256, 2089),
    "lighton-ocr-1b": (400, 1006),
    "llava-next-7b": (1176, 7554),
    "mistral-small-3.1-24b": (400, 24011),
    "ovis2-2b": (259, 2456),
    # Without the head of its own, which only the tensors tell.
    "paddleocr-vl-0.9b": (400, 800),
    "qwen3-vl-30b-a3b": (324, 31071),
    "qwen3.5-4b": (324, 4539),
    "smolvlm2-2.2b": (1377, 2247),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_sizes_of_public_models(name, tmp_path):
    shape = SHAPES[name]
    write_configuration(shape, tmp_path)
    _, config = parse(tmp_path)
    image = media_processor(tmp_path).prepare(picture(shape.picture_size, shape.picture_size))
    assert image.item.num_tokens == SIZES[name][0]
    build = BuildContext(torch.device("meta"), torch.bfloat16, SingleProcessGroup())
    parts = Decoder(config.decoder, build), family_named(config.family).build_encoder(config, build)
    counted = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters()}
    assert round(sum(counted.values()) / 1e6) == SIZES[name][1]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3.5", "llava-next-7b", "smolvlm2-2.2b"])
def test_shapes_are_models_that_can_be_served(name, tmp_path):
    path = write_checkpoint(name, tmp_path)
    front = Frontend.load(EngineConfig(model=str(path)))
    shape = SHAPES[name]
    data = {"image": picture(shape.picture_size, shape.picture_size)}
    prompt = front.from_prompt({"prompt": f"{shape.picture}describe", "multi_modal_data": data})
    assert prompt.media[0].item.num_tokens == SIZES[name][0]
    content = [{"type": "image", "image": data["image"]}, {"type": "text", "text": "describe"}]
    chat = front.from_messages([{"role": "user", "content": content}])
    assert len(chat.inputs.spans) == 1
