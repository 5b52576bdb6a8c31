"""LLaVA-OneVision against Transformers, from the picture to the tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.llava_onevision import FAMILY
from engine.inputs.prompt import PreparedMedia
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_vision_encoder
from tests.engine.tiny import picture, rewrite_json, rewrite_tensors, spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
# 5 patches of 6 pixels per side, and 2 pixels that no patch covers: halved sides are rounded up.
SIDE, PATCH = 32, 6
PINPOINTS = [[a * SIDE, b * SIDE] for a in (1, 2, 3) for b in (1, 2, 3)]
TEMPLATE = "<|im_start|>user {}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 10
SIZES = [(60, 44), (44, 60), (1, 1), (2, 1), (32, 32), (96, 96), (29, 97), (200, 180), (4000, 30), (30, 4000)]
PROMPTS = [
    ("<image>\ndescribe this image", [(60, 44)]),
    ("<image>\n", [(190, 200)]),
    ("<image><image>\nwhat is shown in the pictures?", [(90, 30), (33, 70)]),
    ("hello world", []),
    ("a red <image> square <image><image>", [(20, 20), (64, 200), (41, 83)]),
    ("<image>", [(300, 9)]),
]


def make(path: Path, *, tied: bool = False, hub_names: bool = False) -> Path:
    """A checkpoint of which 2 of the tower's 3 layers are used, and pictures of up to 3x3 tiles show 4."""
    tok = tokenizer(
        SPECIALS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=len(tok),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=tied,
        ),
        image_token_index=SPECIALS.index("<image>"),
        video_token_index=SPECIALS.index("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=tied,
    )
    model = spread(
        transformers.LlavaOnevisionForConditionalGeneration(config), embedding_std=0.05 if tied else 1.0
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    transformers.LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    ).save_pretrained(path)
    if hub_names:
        prefix = "vision_tower."
        rewrite_tensors(
            path,
            lambda tensors: {
                name.replace(prefix, prefix + "vision_model.", 1) if name.startswith(prefix) else name: value
                for name, value in tensors.items()
            },
        )
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def path(request, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("onevision"), tied=request.param, hub_names=request.param)


def parse(path):
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, FAMILY.parse(checkpoint)


def media_processor(path, **options):
    return FAMILY.media_processor(*parse(path), options)


def encoder(path):
    return load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)


def reference_image_processor(path):
    return transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)


def reference_inputs(path: Path, prompt: str, pictures: Sequence) -> dict[str, torch.Tensor]:
    cls = transformers.LlavaOnevisionProcessor
    # Its video half needs torchvision.
    image_only = type(
        cls.__name__, (cls,), {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])}
    )
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    processor = image_only(
        reference_image_processor(path),
        tok,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    # Pictures of one conversation come nested from Transformers' chats, and are then shown in one crop each.
    return processor(text=prompt, images=[list(pictures)] if pictures else None, return_tensors="pt")


@torch.inference_mode()
def greedy(path: Path, inputs: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """The prompt's ids and Transformers' tokens."""
    cls = transformers.LlavaOnevisionForConditionalGeneration
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    ids = inputs["input_ids"][0].tolist()
    return ids, model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()


def video_inputs(path: Path, prompt: str, frames: Sequence) -> dict[str, torch.Tensor]:
    table = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)
    resized = [np.asarray(frame.resize((SIDE, SIDE), 3)) for frame in frames]
    values = [(pixels / 255 - table.image_mean) / table.image_std for pixels in resized]
    rows = len(frames) * 9 + 1
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    inputs = tok(prompt.replace("<video>", "<video>" * rows), return_tensors="pt")
    pixels = torch.tensor(np.stack(values), dtype=torch.float32).permute(0, 3, 1, 2)[None]
    return {**inputs, "pixel_values_videos": pixels}


@pytest.fixture(scope="module")
def cases(path) -> list[tuple[dict, tuple[list[int], list[int]]]]:
    made = []
    for number, (text, sizes) in enumerate(PROMPTS):
        pictures = [picture(*size, 10 * number + i) for i, size in enumerate(sizes)]
        prompt = TEMPLATE.format(text)
        data = {"multi_modal_data": {"image": pictures}} if pictures else {}
        wanted = greedy(path, reference_inputs(path, prompt, pictures))
        made.append(({"prompt": prompt, **data}, wanted))
    frames = [picture(50, 40, 70 + i) for i in range(3)]
    prompt = TEMPLATE.format("<video>\ndescribe this")
    wanted = greedy(path, video_inputs(path, prompt, frames))
    made.append(({"prompt": prompt, "multi_modal_data": {"video": frames}}, wanted))
    return made


# 17 tokens a step split every picture.
@pytest.mark.parametrize("budget", [{}, {"max_num_batched_tokens": 17, "max_num_seqs": 4, "block_size": 4}])
def test_tokens_are_those_of_transformers(path, cases, budget):
    llm = LLM(str(path), max_model_len=400, **budget)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    outputs = llm.generate([entry for entry, _ in cases], params, use_tqdm=False)
    for (entry, (ids, wanted)), output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == wanted
        if not budget:
            (alone,) = llm.generate(entry, params, use_tqdm=False)
            assert alone.outputs[0].token_ids == wanted
    llm.check_integrity()


def test_embeddings_in_place_of_pictures(path, cases):
    llm = LLM(str(path), max_model_len=700)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for entry, (_, wanted) in cases:
        pictures = entry.get("multi_modal_data", {}).get("image")
        if not pictures:
            continue
        processor = media_processor(path)
        if len(pictures) > 1 and hasattr(processor, "among"):
            processor = processor.among(len(pictures))
        rows = encoder(path).encode([processor.prepare(image) for image in pictures])
        given = {"image_embeds": rows, "image_size_list": [image.size for image in pictures]}
        (output,) = llm.generate({**entry, "multi_modal_data": {"image": given}}, params, use_tqdm=False)
        assert output.outputs[0].token_ids == wanted
    llm.check_integrity()


def test_another_picture_gives_another_answer(path, cases):
    entry, (_, wanted) = cases[0]
    other = {**entry, "multi_modal_data": {"image": [picture(60, 44, 99)]}}
    llm = LLM(str(path), max_model_len=400)
    (output,) = llm.generate(other, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
    assert output.outputs[0].token_ids != wanted


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_prepared_as_transformers_does(path, size, several):
    images = [picture(*size), picture(*size, 1)] if several else [picture(*size)]
    theirs = reference_image_processor(path)([images], return_tensors="pt")["pixel_values"]
    ours = media_processor(path).among(len(images))
    media = [ours.prepare(image) for image in images]
    assert all(entry.item.num_tokens == ours.check(size) for entry in media)
    crops = torch.from_numpy(np.concatenate([entry.pixels for entry in media]))
    expected = torch.nn.functional.unfold(theirs.flatten(0, 1), kernel_size=PATCH, stride=PATCH)
    patches = encoder(path).crops.patchify(crops)
    torch.testing.assert_close(patches, expected.transpose(1, 2).flatten(0, 1), atol=0, rtol=0)


def test_public_configuration_is_filled_up(tmp_path):
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "text_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        "torch_dtype": "float16",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, parsed = parse(tmp_path)
    assert parsed.decoder.tie_word_embeddings and parsed.dtype == "float16"
    assert parsed.vision.crops.tower.num_layers == 26 and parsed.vision.crops.rows_per_crop == 729
    assert len(parsed.vision.pinpoints) == 36
    # 2304x2304 pixels are 162x162 features: shrunk to 9 crops' worth.
    processor = media_processor(tmp_path)
    assert processor.check((2304, 2304)) == 729 + 81 * 82
    assert processor.among(2).check((2304, 2304)) == 730


def test_refusals(path):
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="same size"):
        ours.prepare_video([picture(8, 8), picture(8, 9)])
    with pytest.raises(ConfigError, match="num_crops"):
        media_processor(path, num_crops=3)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": {"model_type": "llama"}}, "llama"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
        ({"vision_feature_layer": -9}, "vision_feature_layer"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        ({"image_grid_pinpoints": [[32, 33]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[32, 32]]}, "image_grid_pinpoints"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_field(tmp_path, change, field):
    path = make(tmp_path)
    rewrite_json(path / "config.json", change)
    with pytest.raises(CheckpointError, match=field):
        media_processor(path)
