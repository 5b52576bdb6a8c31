"""Idefics3 and SmolVLM against Transformers, from the picture to the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.idefics3 import FAMILY
from engine.inputs.prompt import PreparedMedia
from engine.layers.bucketed_positions import bucketed_positions
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_vision_encoder
from tests.engine.tiny import picture, rewrite_json, spread, tokenizer

try:
    transformers.Idefics3ImageProcessorPil()
except ImportError:
    pytest.skip("older releases of Transformers need torchvision for this family", allow_module_level=True)

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
TOKENS = 10
SIZES = [(60, 44), (44, 60), (1, 1), (2, 1), (32, 32), (64, 64), (33, 64), (4000, 30), (30, 4000), (641, 480)]
PROMPTS = [
    ("User:<image>describe this image", [(60, 44)]),
    ("User:<image>and<image>what is shown in the pictures?", [(90, 30), (33, 70)]),
    ("User: hello world", []),
    ("User: a red <image> square <image><image>\n", [(20, 20), (64, 200), (41, 83)]),
]


def make(path: Path, kind: str = "Idefics3", *, factor: int = 2, side: int = 32, **tower) -> Path:
    """A checkpoint with crops of ``side`` pixels, and pictures of at most 2x2 or so of them."""
    tok = tokenizer(SPECIALS, vocab_size=340, bos_token="<|im_start|>", eos_token="<end_of_utterance>")
    if kind == "SmolVLM":
        # As in Llama 3's vocabulary, two line feeds are one token.
        tok.add_tokens(["\n\n"])
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 4,
            **tower,
        },
        text_config=transformers.LlamaConfig(
            vocab_size=len(tok),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=SPECIALS.index("<image>"),
        scale_factor=factor,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = spread(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed=5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}
    )
    image_processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["Idefics3", "SmolVLM"])
def path(request, tmp_path_factory) -> Path:
    # Crops that end within a patch, with 25 patches per side: their buckets are not just those in order.
    geometry = {"factor": 5, "side": 102} if request.param == "SmolVLM" else {}
    return make(tmp_path_factory.mktemp(request.param), request.param, **geometry)


def parse(path):
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, FAMILY.parse(checkpoint)


def media_processor(path, **options):
    return FAMILY.media_processor(*parse(path), options)


def encoder(path):
    return load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)


def reference_image_processor(path):
    kind = "SmolVLM" if "SmolVLM" in str(path) else "Idefics3"
    return getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(path)


@torch.inference_mode()
def reference(path: Path, prompt: str, pictures: list) -> tuple[list[int], list[int]]:
    """Transformers' prompt ids and greedy tokens."""
    rows = parse(path)[1].vision.rows_per_crop
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    processor = transformers.Idefics3Processor(reference_image_processor(path), tok, image_seq_len=rows)
    inputs = processor(text=prompt, images=[pictures] if pictures else None, return_tensors="pt")
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    ids = inputs["input_ids"][0].tolist()
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
    return ids, out.tolist()


@pytest.fixture(scope="module")
def cases(path) -> list[tuple[dict, tuple[list[int], list[int]]]]:
    made = []
    for number, (prompt, sizes) in enumerate(PROMPTS):
        pictures = [picture(*size, 10 * number + i) for i, size in enumerate(sizes)]
        prompt = f"<|im_start|>{prompt}<end_of_utterance>\nAssistant:"
        data = {"multi_modal_data": {"image": pictures}} if pictures else {}
        made.append(({"prompt": prompt, **data}, reference(path, prompt, pictures)))
    return made


# 17 tokens a step split every picture, and every crop of one.
@pytest.mark.parametrize("budget", [{}, {"max_num_batched_tokens": 17, "max_num_seqs": 4, "block_size": 4}])
def test_tokens_are_those_of_transformers(path, cases, budget):
    llm = LLM(str(path), max_model_len=700, **budget)
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
    llm = LLM(str(path), max_model_len=700)
    (output,) = llm.generate(other, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
    assert output.outputs[0].token_ids != wanted


@pytest.mark.parametrize("options", [{}, {"do_image_splitting": False}, {"size": {"longest_edge": 100}}])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_prepared_as_transformers_does(path, size, options):
    image = picture(*size)
    theirs = reference_image_processor(path)(image, return_tensors="pt", return_row_col_info=True, **options)
    ours = media_processor(path, **options)
    media = ours.prepare(image)
    assert media.item.grid[1:] == (theirs["rows"][0][0], theirs["cols"][0][0])
    assert media.item.num_tokens == ours.check(size)
    assert not torch.any(theirs["pixel_attention_mask"] == 0)
    patches = encoder(path).patchify(torch.from_numpy(media.pixels.copy()))
    expected = torch.nn.functional.unfold(theirs["pixel_values"][0], kernel_size=4, stride=4)
    torch.testing.assert_close(patches, expected.transpose(1, 2).flatten(0, 1), atol=0, rtol=0)


@pytest.mark.parametrize("side", [6, 25, 26, 32])
@pytest.mark.parametrize("shape", [(1, 1), (25, 49), (27, 26), (32, 3)], ids=str)
def test_positions_are_those_of_transformers(side, shape):
    height, width = shape
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": 1, "num_attention_heads": 1, "image_size": side, "patch_size": 1}
    ).vision_config
    module = Idefics3VisionEmbeddings(config)
    module.patch_embedding.weight.data.zero_()
    module.patch_embedding.bias.data.zero_()
    module.position_embedding.weight.data = torch.arange(float(side**2))[:, None]
    with torch.inference_mode():
        wanted = module(torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool))
    assert bucketed_positions(height, width, side).tolist() == wanted.flatten().tolist()


def test_public_configuration_is_filled_up(tmp_path):
    """SmolVLM-256M's files say little of the tower."""
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "idefics3",
        "scale_factor": 4,
        "text_config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_theta": 100000,
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 768,
            "image_size": 512,
            "model_type": "idefics3",
            "num_attention_heads": 12,
            "patch_size": 16,
            "size": {"longest_edge": 2048},
        },
    }
    preprocessor = {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}, "resample": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    _, parsed = parse(tmp_path)
    tower = parsed.vision.tower
    assert (tower.num_layers, tower.intermediate_size, tower.num_positions) == (12, 3072, 1024)
    assert parsed.vision.rows_per_crop == 64 and parsed.decoder.rms_norm_eps == 1e-5
    assert media_processor(tmp_path).grid((1600, 1200)) == (13, 3, 4)
    assert media_processor(tmp_path, size={"longest_edge": 512}).grid((1600, 1200)) == (1, 0, 0)


def test_refusals(path):
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="frames"):
        ours.prepare_video([picture(8, 8)])
    for options in ({"num_crops": 3}, {"size": {"longest_edge": 0}}, {"do_image_splitting": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            media_processor(path, **options)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": {"model_type": "mistral"}}, "mistral"),
        ({"scale_factor": 3}, "scale_factor"),
        ({"vision_config": {"image_size": 64, "patch_size": 4}}, "max_image_size"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_field(tmp_path, change, field):
    path = make(tmp_path)
    rewrite_json(path / "config.json", change)
    with pytest.raises(CheckpointError, match=field):
        media_processor(path)
