"""Embeddings in place of images: the same tokens, and clear refusals."""

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest

from . import tiny

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PARAMS = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> LLM:
    path = tiny.make_qwen2_vl(tmp_path_factory.mktemp("qwen"), seed=6)
    return LLM(str(path), max_model_len=200, limit_mm_per_prompt={"image": 2}, max_num_batched_tokens=23)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> LLM:
    return LLM(str(tiny.make_llava(tmp_path_factory.mktemp("llava"))), max_model_len=200)


def encoded(llm: LLM, pictures) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """Rows and grids of images, by the model's own encoder."""
    media = [llm._frontend._processor.prepare(picture) for picture in pictures]
    return llm._encoder.encode(media), [entry.item.grid for entry in media]


def tokens(llm: LLM, prompt: str, image) -> list[int]:
    entry = {"prompt": prompt, "multi_modal_data": {"image": image}}
    (output,) = llm.generate(entry, PARAMS, use_tqdm=False)
    llm.check_integrity()
    return output.outputs[0].token_ids


def test_qwen_by_grid(qwen):
    pictures = [tiny.picture(40, 56, 1), tiny.picture(72, 24, 2)]
    rows, grids = encoded(qwen, pictures)
    prompt = f"first {IMAGE} second {IMAGE} what?"
    wanted = tokens(qwen, prompt, pictures)
    assert wanted != tokens(qwen, prompt, pictures[::-1])
    ways = [
        {"image_embeds": torch.cat(rows), "image_grid_thw": torch.tensor(grids)},
        {"image_embeds": rows, "image_grid_thw": grids},
        {"image_embeds": [r[None].cpu().numpy() for r in rows], "image_grid_thw": np.array(grids)},
    ]
    for image in ways:
        assert tokens(qwen, prompt, image) == wanted
    one = {"image_embeds": rows[0][None], "image_grid_thw": torch.tensor(grids[:1])}
    assert tokens(qwen, IMAGE + "what?", one) == tokens(qwen, IMAGE + "what?", pictures[0])


def test_llava_by_rows_alone(llava):
    pictures = [tiny.picture(50, 40, 1), tiny.picture(30, 60, 2)]
    rows, _ = encoded(llava, pictures)
    wanted = tokens(llava, "USER: <image>\nand <image>\nwhat? ASSISTANT:", pictures)
    for image in (torch.stack(rows), rows, [r[None] for r in rows], [r.to(torch.float64) for r in rows]):
        assert tokens(llava, "USER: <image>\nand <image>\nwhat? ASSISTANT:", image) == wanted
    single = "USER: <image>\nwhat? ASSISTANT:"
    assert tokens(llava, single, rows[0][None]) == tokens(llava, single, pictures[0])


def test_in_a_batch_with_images_and_texts(qwen):
    picture = tiny.picture(40, 56, 1)
    (rows,), (grid,) = encoded(qwen, [picture])
    prompts = [
        {"prompt": IMAGE + "a", "multi_modal_data": {"image": picture}},
        "hello world",
        {
            "prompt": IMAGE + "a",
            "multi_modal_data": {"image": {"image_embeds": rows[None], "image_grid_thw": [grid]}},
        },
    ]
    outputs = [o.outputs[0].token_ids for o in qwen.generate(prompts, PARAMS, use_tqdm=False)]
    assert outputs[0] == outputs[2] != outputs[1]


def test_what_is_refused(qwen, llava):
    (rows,), (grid,) = encoded(qwen, [tiny.picture(40, 56, 1)])
    count = len(rows)
    for image, words in (
        ({"image_embeds": rows[None]}, "need image_grid_thw"),
        ({"image_embeds": rows[None, 1:], "image_grid_thw": [grid]}, f"{count - 1} rows.* needs {count}"),
        ({"image_embeds": rows[None, :, 1:], "image_grid_thw": [grid]}, "shape"),
        ({"image_embeds": rows[None].long(), "image_grid_thw": [grid]}, "floating-point"),
        ({"image_embeds": rows[None] / 0, "image_grid_thw": [grid]}, "not finite"),
        ({"image_embeds": rows.to_sparse(), "image_grid_thw": [grid]}, "dense"),
        ({"image_embeds": rows[None, None], "image_grid_thw": [grid]}, "must have the shape"),
        ({"image_embeds": rows[None], "image_grid_thw": [(1, 3, 4)]}, "multiples of 2"),
        ({"image_embeds": rows[None], "image_grid_thw": [(1, -2, 4)]}, "positive"),
        ({"image_embeds": rows[None], "image_grid_thw": [grid, grid]}, "1 items.* describes 2"),
        ({"image_embeds": rows[None], "image_grid_thw": [grid], "other": 1}, "'other'"),
        ({"image_embeds": [rows] * 3, "image_grid_thw": [grid] * 3}, "limit_mm_per_prompt allows 2"),
        ({"image_embeds": "rows.pt", "image_grid_thw": [grid]}, "must be a tensor"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            tokens(qwen, IMAGE + "what?", image)
    with pytest.raises(InvalidRequest, match="placeholders"):
        tokens(qwen, "no placeholder", {"image_embeds": rows[None], "image_grid_thw": [grid]})
    with pytest.raises(InvalidRequest, match="rows"):
        tokens(llava, "USER: <image> ASSISTANT:", torch.zeros(1, 3, 64))
    qwen.check_integrity()


def test_the_same_rows_under_another_grid_are_another_image(qwen):
    """Blocks cached for the first must not serve the second: positions and tokens around it differ."""
    width = qwen._engine.model.embedding_width
    rows = torch.randn(48, width, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0)

    def asked(grid, salt):
        image = {"image_embeds": rows, "image_grid_thw": [grid]}
        entry = {"prompt": IMAGE + "the quick brown fox", "multi_modal_data": {"image": image}}
        (output,) = qwen.generate({**entry, "cache_salt": salt}, params, use_tqdm=False)
        chosen = zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
        return [(token, row[token].logprob) for row, token in chosen]

    grids = [(1, 12, 16), (1, 16, 12), (3, 8, 8)]
    alone = [asked(grid, f"alone {grid}") for grid in grids]
    assert alone[0] != alone[1] != alone[2]
    for grid, wanted in zip(grids, alone, strict=True):
        found = asked(grid, "shared")
        assert [token for token, _ in found] == [token for token, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], abs=1e-4)
