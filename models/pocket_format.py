"""The pocket model's shape, tokenizer and chat format, and how samples become tensors."""

from __future__ import annotations

import json
import math
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from models import questions
from models import samples as data

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
END, PAD, IMAGE = SPECIALS.index("<|im_end|>"), 0, SPECIALS.index("<|image_pad|>")
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Be brief.", "Answer in one sentence.")
PATCH, MERGE = 14, 2
FACTOR = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 112 * 112, 224 * 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCABULARY = 1024
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    # Contexts are short. With a usual base the width's share of the angles would be next to nothing over the
    # few rows and columns of an image.
    "rope_theta": 300.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 12, 18]},
}
VISION = {
    "depth": 6,
    "embed_dim": 192,
    "num_heads": 3,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE over the scenes' questions and answers; written words stay letter by letter.

    The corpus has equally many questions of each task, whatever the tasks weigh in training: the vocabulary
    is the same before and after those weights change.
    """
    corpus = []
    tasks = (*questions.SHAPE_ASKERS, "two pictures")
    for index in range(6000):
        rng, task = random.Random(index), tasks[index % len(tasks)]
        if task == "two pictures":
            turns = data.comparison_sample(rng, (96, 96)).turns
        else:
            turns = [data.make_scene(rng, task, (96, 96))[1]]
        corpus += [text for turn in turns for text in (turn.question, turn.answer)]
    corpus += [text for greetings, answer in data.CHATS for text in (*greetings, answer)]
    corpus += [
        "user\n",
        "assistant\n",
        "system\n",
        "You are a helpful assistant.",
        'It says "',
        '".',
        "What does it say?",
        *SYSTEM_MESSAGES,
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(corpus, trainer)
    return core


@lru_cache(maxsize=1 << 15)
def _ids(core: Tokenizer, text: str) -> list[int]:
    return core.encode(text, add_special_tokens=False).ids


class PromptRow:
    """Ids, labels (-100 where nothing is learned) and M-RoPE positions of one sequence, as it grows."""

    def __init__(self, core: Tokenizer) -> None:
        self.core = core
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._positions: list[np.ndarray] = []
        self._at = 0

    @property
    def positions(self) -> np.ndarray:
        """``(3, L)``: time, height and width."""
        return np.concatenate(self._positions, axis=1)

    def text(self, value: str, learn: bool = False) -> None:
        new = _ids(self.core, value)
        self.ids.extend(new)
        self.labels.extend(new if learn else [-100] * len(new))
        self._positions.append(np.broadcast_to(np.arange(self._at, self._at + len(new)), (3, len(new))))
        self._at += len(new)

    def picture(self, grid: tuple[int, int]) -> None:
        """An image of ``grid`` patches (height, width), between its delimiter tokens."""
        rows, columns = grid[0] // MERGE, grid[1] // MERGE
        self.text("<|vision_start|>")
        row, column = np.divmod(np.arange(rows * columns), columns)
        self.ids.extend([IMAGE] * (rows * columns))
        self.labels.extend([-100] * (rows * columns))
        self._positions.append(
            np.stack([np.full(rows * columns, self._at), self._at + row, self._at + column])
        )
        self._at += max(rows, columns)
        self.text("<|vision_end|>")


def encode_sample(
    core: Tokenizer, sample: data.Sample, grid: tuple[int, int], rng: random.Random | None = None
) -> PromptRow:
    """A conversation, of which only answers are learned.

    Args:
        grid: patches of each image, by height and width.
        rng: draws a system message and the order of images and question; without it there is no system
            message, images come first, and all ends where the first answer begins.
    """
    row = PromptRow(core)
    if rng is not None and rng.random() < 0.08:
        row.text(f"<|im_start|>system\n{rng.choice(SYSTEM_MESSAGES)}<|im_end|>\n")
    for number, turn in enumerate(sample.turns):
        row.text("<|im_start|>user\n")
        shown = sample.shown_at.count(number)
        question_first = rng is not None and rng.random() < 0.3
        if question_first:
            row.text(turn.question)
        for _ in range(shown):
            row.picture(grid)
        if not question_first:
            row.text(turn.question)
        row.text("<|im_end|>\n<|im_start|>assistant\n")
        if rng is None:
            break
        row.text(f"{turn.answer}<|im_end|>", learn=True)
        row.text("\n")
    return row


def resized(size: tuple[int, int]) -> tuple[int, int]:
    """Qwen2-VL's size rule: width and height of an image as the model sees it."""
    width, height = size
    h, w = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if h * w > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        h = max(FACTOR, math.floor(height / beta / FACTOR) * FACTOR)
        w = max(FACTOR, math.floor(width / beta / FACTOR) * FACTOR)
    elif h * w < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        h, w = math.ceil(height * beta / FACTOR) * FACTOR, math.ceil(width * beta / FACTOR) * FACTOR
    return w, h


def patches(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of width and height ``size``."""
    width, height = resized(size)
    return height // PATCH, width // PATCH


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 ``(H, W, 3)``."""
    return np.asarray(image.convert("RGB").resize(resized(image.size), Image.Resampling.BICUBIC))


def collate(
    core: Tokenizer, samples: list[data.Sample], grid: tuple[int, int], rng: random.Random | None = None
) -> dict[str, torch.Tensor]:
    rows = [encode_sample(core, sample, grid, rng) for sample in samples]
    return stack(rows, [image for sample in samples for image in sample.images])


def stack(rows: list[PromptRow], images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Sequences padded at their ends, and their images, which have one size.

    Returns:
        int64 ``ids`` and ``labels`` ``(B, L)``, ``positions`` ``(3, B, L)`` and ``lengths`` ``(B,)``; uint8
        ``pixels`` ``(N, H, W, 3)``; ``picture_rows``, where among the flattened ``ids`` their rows go.
    """
    # Few lengths, so that few shapes of batches.
    length = -(-max(len(row.ids) for row in rows) // 64) * 64
    ids = np.full((len(rows), length), PAD, np.int64)
    labels = np.full((len(rows), length), -100, np.int64)
    positions = np.zeros((3, len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        labels[index, : len(row.ids)] = row.labels
        positions[:, index, : len(row.ids)] = row.positions
    seen = [pixels(image) for image in images]
    return {
        "pixels": torch.from_numpy(np.stack(seen)) if seen else torch.zeros(0, 1, 1, 3, dtype=torch.uint8),
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "positions": torch.from_numpy(positions),
        "lengths": torch.tensor([len(row.ids) for row in rows]),
        "picture_rows": torch.from_numpy(np.flatnonzero(ids == IMAGE)),
    }


@lru_cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of channels, of pixels from 0 to 255."""
    return torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255


def patchify(images: torch.Tensor, frames: int = 2) -> torch.Tensor:
    """uint8 ``(N, H, W, 3)`` to normalised patches ``(N, H * W / 196, 588 * frames)``, 2x2 neighbours
    together, each image standing for so many frames."""
    n, height, width, _ = images.shape
    mean, std = _statistics(images.device)
    x = (images.float() - mean) / std
    gh, gw = height // FACTOR, width // FACTOR
    x = x.view(n, gh, MERGE, PATCH, gw, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(n, gh * gw * MERGE * MERGE, -1)


def write_text_files(core: Tokenizer, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    generation = {"bos_token_id": PAD, "eos_token_id": [END, PAD], "pad_token_id": PAD, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def make_model(core: Tokenizer) -> Qwen2VLForConditionalGeneration:
    ids = {text: core.token_to_id(text) for text in SPECIALS}
    config = Qwen2VLConfig(
        text_config={
            **{k: v for k, v in TEXT.items() if k not in ("rope_theta", "rope_scaling")},
            "vocab_size": core.get_vocab_size(),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": TEXT["rope_theta"],
                "mrope_section": TEXT["rope_scaling"]["mrope_section"],
            },
            "bos_token_id": PAD,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        vision_config={**VISION, "hidden_size": TEXT["hidden_size"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=TEXT["tie_word_embeddings"],
    )
    return Qwen2VLForConditionalGeneration(config)
