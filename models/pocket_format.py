"""The pocket model's shape, tokenizer and chat format, and how samples become tensors."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from models import calls, questions
from models import samples as data
from models.scenes import text_scene

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
#: In the vocabulary as whole tokens that text may spell, as in Qwen's.
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]
_TAG = re.compile(r"<\|\w+\|>|</?\w+>|\0")
#: Functions are listed by name and parameters alone: descriptions are beyond the model and fill its context.
TEMPLATE = """\
{%- macro written(content) -%}
{%- if content is string -%}
{{ content }}
{%- elif content -%}
{%- for part in content -%}
{%- if part['type'] in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if system -%}
{{ written(system) + '\\n' }}
{%- endif -%}
{{ '<tools>\\n' }}
{%- for tool in tools -%}
{%- set function = tool['function'] if 'function' in tool else tool -%}
{%- set parameters = function['parameters'] if function['parameters'] is mapping else {} -%}
{%- set properties = parameters['properties'] if parameters['properties'] is mapping else {} -%}
{{ function['name'] + '(' }}
{%- for name in properties -%}
{%- set kind = properties[name]['type'] if properties[name] is mapping else none -%}
{{ ', ' if not loop.first }}{{ name + ': ' + (kind if kind is string else 'any') }}
{%- endfor -%}
{{ ')\\n' }}
{%- endfor -%}
{{ '</tools><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}
{{ '<|im_start|>user' }}
{%- endif -%}
{{ '\\n<tool_response>\\n' + written(message['content']) + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- elif not (tools and loop.first and message['role'] == 'system') -%}
{{ '<|im_start|>' + message['role'] + '\\n' + written(message['content']) }}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] if 'function' in call else call -%}
{{ '\\n' if message['content'] or not loop.first }}
{{- '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
#: Stands for an image in the texts of a dialogue.
PICTURE = "\0"
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Be brief.", "Answer in one sentence.")
PATCH, MERGE = 14, 2
FACTOR = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 112 * 112, 224 * 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCABULARY, GROWTH = 1024, 160
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


def make_tool_tokenizer() -> Tokenizer:
    """:func:`make_tokenizer`'s with tokens for calls and JSON."""
    return grown(make_tokenizer(), _tool_texts(), _corpus() + _written_texts(), GROWTH)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE over the scenes' questions and answers; written words stay letter by letter.

    The corpus has equally many questions of each task, whatever the tasks weigh in training: the vocabulary
    is the same before and after those weights change.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(_corpus(), trainer)
    return core


def _corpus() -> list[str]:
    """Equally many questions and answers of each task."""
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
    return corpus


def _written_texts() -> list[str]:
    """Questions about written words, and their answers."""
    turns = [data.make_scene(random.Random(index), "word", (96, 96))[1] for index in range(200)]
    scene = text_scene(random.Random(0), (96, 96), "A")
    captions = [questions.ask_caption(scene, random.Random(index)) for index in range(40)]
    return [text for turn in (*turns, *captions) if turn for text in (turn.question, turn.answer)]


def _tool_texts() -> list[str]:
    """Texts of calls and JSON answers, cut at images and tags; equally many of each kind."""
    kinds = [lambda rng, size: calls.text_dialogue(rng), *calls.PICTURE_DIALOGUES]
    texts = []
    for index in range(1500):
        dialogue = kinds[index % len(kinds)](random.Random(index), (96, 96))
        texts += [part for piece, _ in dialogue_pieces(dialogue) for part in _TAG.split(piece)]
    return texts


def grown(core: Tokenizer, texts: list[str], kept: list[str], count: int) -> Tokenizer:
    """A tokenizer with ``count`` merges more, learned from ``texts``, and with the tags as tokens.

    Ids and merges of ``core`` stay, and what it makes of ``kept``. Capitals and digits are not merged:
    written words stay letter by letter.
    """
    state = json.loads(core.to_str())
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word, _ in core.pre_tokenizer.pre_tokenize_str(text):
            if not any(c.isupper() or c.isdigit() for c in word):
                words[word] += 1
    split = {
        tuple(core.encode(_plain(word), add_special_tokens=False).tokens): n for word, n in words.items()
    }
    taken = {pair for text in kept for pair in itertools.pairwise(core.encode(text).tokens)}
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, number in split.items():
            for pair in itertools.pairwise(parts):
                if pair not in taken:
                    pairs[pair] += number
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        state["model"]["merges"].append(list(best))
        state["model"]["vocab"].setdefault("".join(best), len(state["model"]["vocab"]))
        split = {_merged(parts, best): number for parts, number in split.items()}
    core = Tokenizer.from_str(json.dumps(state))
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return core


def _plain(word: str) -> str:
    """The text of a word in the byte-level alphabet."""
    return decoders.ByteLevel().decode([word])


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


@lru_cache(maxsize=1 << 15)
def _ids(core: Tokenizer, text: str) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a text, and where each ends."""
    encoded = core.encode(text, add_special_tokens=False)
    return encoded.ids, tuple(end for _, end in encoded.offsets)


#: Ranges of characters.
Spans = tuple[tuple[int, int], ...]


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

    def text(self, value: str, learn: bool | Spans = False) -> None:
        """Append text, of which all, nothing, or the tokens that touch some spans are learned."""
        new, ends = _ids(self.core, value)
        self.ids.extend(new)
        if isinstance(learn, bool):
            learn = ((0, len(value)),) if learn else ()
        starts = (0, *ends)
        self.labels.extend(
            token if any(start < b and a < end for a, b in learn) else -100
            for token, start, end in zip(new, starts, ends, strict=False)
        )
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


Piece = tuple[str, "bool | Spans"]


def encode_dialogue(core: Tokenizer, dialogue: calls.Dialogue, grid: tuple[int, int]) -> PromptRow:
    """A conversation with tools or JSON, as the template writes it; images have ``grid`` patches each."""
    row = PromptRow(core)
    for text, learn in dialogue_pieces(dialogue):
        for number, part in enumerate(text.split(PICTURE)):
            if number:
                row.picture(grid)
            if part:
                row.text(part, learn)
    return row


def dialogue_pieces(dialogue: calls.Dialogue) -> Iterator[Piece]:
    """Texts of a prompt in order, each with what is learned of it."""
    messages = dialogue.messages
    system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
    if dialogue.tools:
        yield f"<|im_start|>system\n{system}<tools>\n{_listing(dialogue.tools)}</tools><|im_end|>\n", False
    elif system:
        yield f"<|im_start|>system\n{system[:-1]}<|im_end|>\n", False
    role_before = None
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            yield "<|im_start|>assistant\n", False
            yield from _answer(message, dialogue.values_only)
            yield "\n", False
        elif role == "tool":
            start = "<|im_start|>user" if role_before != "tool" else ""
            more = index + 1 < len(messages) and messages[index + 1]["role"] == "tool"
            end = "" if more else "<|im_end|>\n"
            yield f"{start}\n<tool_response>\n{message['content']}\n</tool_response>{end}", False
        elif role == "user":
            yield f"<|im_start|>user\n{_written(message['content'])}<|im_end|>\n", False
        role_before = role


def _written(content: list[dict[str, Any]]) -> str:
    return "".join(PICTURE if part["type"] == "image" else part["text"] for part in content)


def _listing(tools: list[dict[str, Any]]) -> str:
    lines = []
    for tool in tools:
        function = tool["function"]
        properties = function["parameters"]["properties"]
        inner = ", ".join(f"{name}: {schema['type']}" for name, schema in properties.items())
        lines.append(f"{function['name']}({inner})\n")
    return "".join(lines)


def _answer(message: dict[str, Any], values_only: bool) -> Iterator[Piece]:
    """An assistant's text or calls, and the end of its turn."""
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        head = f'{chr(10) if index else ""}<tool_call>\n{{"name": "{function["name"]}", "arguments": '
        arguments = json.dumps(function["arguments"])
        spans = _value_spans(function["arguments"], len(head)) if values_only else ((0, 1 << 20),)
        yield f"{head}{arguments}}}\n</tool_call>", spans
    if message["content"] is not None:
        text = message["content"]
        yield text, _value_spans(json.loads(text), 0) if values_only else True
    yield "<|im_end|>", not values_only


def _value_spans(value: Any, offset: int) -> Spans:
    """Positions of strings and numbers in ``json.dumps(value)``, with the character that ends each."""
    if isinstance(value, dict):
        spans: Spans = ()
        for key, inner in value.items():
            offset += len(json.dumps(key)) + 3
            spans += _value_spans(inner, offset)
            offset += len(json.dumps(inner)) + 1
        return spans
    if isinstance(value, list):
        spans = ()
        for inner in value:
            # Whether the list goes on is for the model to say.
            end = offset + 1 + len(json.dumps(inner))
            spans += (*_value_spans(inner, offset + 1), (end, end + 1))
            offset = end + 1
        return spans
    length = len(json.dumps(value))
    return ((offset + 1, offset + length),) if isinstance(value, str) else ((offset, offset + length + 1),)


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


def stack(rows: list[PromptRow], images: list[Image.Image], multiple: int = 64) -> dict[str, torch.Tensor]:
    """Sequences padded at their ends to a multiple of tokens, and their images, which have one size.

    Returns:
        int64 ``ids`` and ``labels`` ``(B, L)``, ``positions`` ``(3, B, L)`` and ``lengths`` ``(B,)``; uint8
        ``pixels`` ``(N, H, W, 3)``; ``picture_rows``, where among the flattened ``ids`` their rows go.
    """
    # Few lengths, so that few shapes of batches.
    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
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
