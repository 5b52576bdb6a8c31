"""Tests of Phi-3.5-vision and VLM2Vec alone; ``test_laws.py`` compares whole answers of all families."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.load import load_vision_encoder
from engine.families.phi3_v.family import FAMILY
from engine.model_parts import load_media_processor
from tests.engine.families.case import TOKENS, CasePrompt
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.phi3_v_reference import ORIGINAL, Phi3VReference, canvas_of, make_phi3_v
from tests.engine.tiny import picture, rewrite_json

SIZES = [(60, 44), (44, 70), (28, 28), (1, 1), (200, 20), (20, 200), (27, 29), (640, 480), (99, 100)]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    path = tmp_path_factory.mktemp("phi3_v")
    return path, make_phi3_v(path, seed=3)


@pytest.mark.parametrize("pictures", [0, 1])
def test_an_answer_that_grows_beyond_the_original_context_is_computed_again(composed, pictures):
    """Each token is the one that the reference gives for all tokens before it, computed anew."""
    path, _ = composed
    reference = Phi3VReference(path)
    images = (picture(28, 28, 5),) * pictures
    placeholder = "<|image_1|>\n" * pictures

    def prompt_of(count: int) -> CasePrompt:
        return CasePrompt(f"<|user|>\n{placeholder}{'a ' * count}<|end|>\n<|assistant|>\n", images)

    # One prompt ends just before the boundary, one behind it.
    near = next(n for n in range(ORIGINAL) if len(reference.inputs(prompt_of(n)).ids) >= ORIGINAL - 5)
    prompts = [prompt_of(near), prompt_of(near + 20)]
    llm = LLM(str(path), max_model_len=512, kv_cache_bytes=8 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([prompt.entry for prompt in prompts], params, use_tqdm=False)
    assert len(outputs[0].prompt_token_ids) < ORIGINAL < len(outputs[1].prompt_token_ids)
    for prompt, output in zip(prompts, outputs, strict=True):
        given, found = reference.inputs(prompt), []
        embeds = given.arguments["inputs_embeds"]
        for _ in range(12):
            with torch.inference_mode():
                found.append(int(reference.model.language(inputs_embeds=embeds).logits[0, -1].argmax()))
            embeds = torch.cat([embeds, reference.model.embeds(found[-1:], {})], dim=1)
        assert output.outputs[0].token_ids == found
    llm.check_integrity()


@pytest.mark.parametrize("num_crops", [1, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_images_and_rows(composed, size, num_crops):
    path, reference = composed
    processor = load_media_processor(
        EngineConfig(model=str(path), mm_processor_kwargs={"num_crops": num_crops})
    )
    image = picture(*size, 4)
    prepared = processor.prepare(image)
    assert np.array_equal(prepared.pixels, np.asarray(canvas_of(image, num_crops)))
    assert processor.check(size) == prepared.item.num_tokens
    checkpoint = Checkpoint.open(str(path))
    config = FAMILY.parse(checkpoint)
    encoder = load_vision_encoder(checkpoint, config, device=torch.device("cpu"), dtype=torch.float32)
    other = processor.prepare(picture(50, 60, 8))
    with torch.inference_mode():
        wanted = reference.rows(image, num_crops)
    (alone,) = encoder.encode([prepared])
    _, beside = encoder.encode([other, prepared])
    for rows in (alone, beside):
        torch.testing.assert_close(rows, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("size", [(201, 1), (1, 448), (1000, 3)])
def test_elongated_images(composed, size):
    path, _ = composed
    options = {"num_crops": 16}
    processor = load_media_processor(EngineConfig(model=str(path), mm_processor_kwargs=options))
    image = picture(*size, 4)
    assert np.array_equal(processor.prepare(image).pixels, np.asarray(canvas_of(image, 16)))


def test_chat(tmp_path):
    model = Made(case_named("Phi-3.5-vision"), tmp_path / "made")
    image = picture(60, 44)
    prompt = "<|user|>\n<|image_1|>\ndescribe this image<|end|>\n<|assistant|>\n"
    content = [{"type": "image", "image": image}, {"type": "text", "text": "describe this image"}]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    (output,) = model.llm().chat([{"role": "user", "content": content}], params, use_tqdm=False)
    assert output.prompt == prompt
    assert output.outputs[0].token_ids == model.answer(CasePrompt(prompt, (image,))).tokens


def test_refusals(composed, tmp_path):
    path, _ = composed
    with pytest.raises(ConfigError, match="from 1 to 64"):
        load_media_processor(EngineConfig(model=str(path), mm_processor_kwargs={"num_crops": 65}))
    with pytest.raises(ConfigError, match="'crops'"):
        load_media_processor(EngineConfig(model=str(path), mm_processor_kwargs={"crops": 4}))
    processor = load_media_processor(EngineConfig(model=str(path)))
    unit, crops = processor.vision.image_size, processor.num_crops
    # Scaled to all crops in a row, one more would leave less than a pixel of its height.
    assert processor.prepare(Image.new("RGB", (crops * unit, 1))).item.grid == (1, crops)
    assert processor.prepare(Image.new("RGB", (1, crops * unit))).item.grid == (crops, 1)
    with pytest.raises(InvalidRequest, match=f"at most {crops * unit} times"):
        processor.prepare(Image.new("RGB", (crops * unit + 1, 1)))
    make_phi3_v(tmp_path)
    rewrite_json(tmp_path / "config.json", {"embd_layer": {"hd_transform_order": "glb_sub"}})
    with pytest.raises(CheckpointError, match="hd_transform_order"):
        FAMILY.parse(Checkpoint.open(str(tmp_path)))


def test_public_configuration(tmp_path):
    """config.json doesn't mention CLIP-L/14-336: 757 rows for a square image in one crop."""
    public = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "eos_token_id": 2,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48},
    }
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Phi3VForCausalLM"], **public}))
    model = FAMILY.parse(Checkpoint.open(str(tmp_path)))
    assert model.eos_token_ids == (2, 32000, 32007) and model.image_token_id == 32044
    config = model.vision
    assert config.tower.num_layers == 23 and config.tower.hidden_size == 1024 and config.side == 24
    # (crops + 1) * 144 + 1 + (down + 1) * 12
    for down, across in ((1, 1), (2, 2), (1, 4), (4, 4)):
        assert config.num_rows((down, across)) == (down * across + 1) * 144 + 1 + (down + 1) * 12
