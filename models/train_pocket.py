"""Trains the pocket model from nothing, in one run of bounded time on one GPU.

    python -m models.train_pocket --out models/pocket --seconds 520

See :mod:`models.training` for how.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from models import calls, eval_pocket, training
from models import samples as data
from models.pocket_format import (
    END,
    IMAGE,
    PAD,
    PATCH,
    collate,
    encode_dialogue,
    encode_sample,
    patches,
    patchify,
    pixels,
    resized,
    stack,
)
from models.scenes import random_size


class Conversations:
    """Draws batches of conversations.

    Args:
        dialogues: the share of batches with tools or JSON.
        small: the share of images that are made small, at which a CPU learns at less cost.
        multiple: lengths are rounded up to a multiple of this many tokens.
    """

    def __init__(
        self, core: Tokenizer, batch_size: int, dialogues: float, small: float = 0.0, multiple: int = 64
    ) -> None:
        self.core, self.batch_size, self.dialogues = core, batch_size, dialogues
        self.small, self.multiple = small, multiple
        self._ready: list[training.Batch] = []

    def __call__(self, rng: random.Random) -> training.Batch:
        if rng.random() >= self.dialogues:
            return self._questions(rng)
        if not self._ready:
            self._ready = self._dialogues(rng)
        return self._ready.pop()

    def _dialogues(self, rng: random.Random) -> list[training.Batch]:
        """Several batches; those of similar length stand together, since there are short and long ones."""
        count, batches = 4 * self.batch_size, []
        if rng.random() < 0.04:
            size = None
            drawn = [calls.text_dialogue(rng) for _ in range(count)]
        else:
            size = small_size(rng) if rng.random() < self.small else resized(random_size(rng))
            drawn = [calls.picture_dialogue(rng, size) for _ in range(count)]
        grid = patches(size) if size else (0, 0)
        rows = [(encode_dialogue(self.core, dialogue, grid), dialogue) for dialogue in drawn]
        rows.sort(key=lambda pair: len(pair[0].ids))
        for start in range(0, count, self.batch_size):
            part = rows[start : start + self.batch_size]
            images = [image for _, dialogue in part for image in dialogue.images]
            batches.append(stack([row for row, _ in part], images, self.multiple))
        rng.shuffle(batches)
        return batches

    def _questions(self, rng: random.Random) -> training.Batch:
        kind = rng.random()
        if kind < 0.005:
            chats = [data.chat_sample(rng) for _ in range(self.batch_size)]
            return collate(self.core, chats, (0, 0), rng)
        if kind < 0.13:
            # Of few sizes: every other one is a shape of batch of its own.
            size = random_size(random.Random(rng.randrange(12)))
            draw = data.comparison_sample if kind < 0.1 else data.album_sample
            samples = [draw(rng, size) for _ in range(self.batch_size // 2)]
        else:
            size = small_size(rng) if rng.random() < self.small else random_size(rng)
            if rng.random() < 0.65:
                # As the model sees it: drawn without resizing, which takes longer than all the rest.
                size = resized(size)
            samples = [data.picture_sample(rng, size, 5) for _ in range(self.batch_size)]
        return collate(self.core, samples, patches(size), rng)


def small_size(rng: random.Random) -> tuple[int, int]:
    """Width and height as the model sees them, small."""
    width, height = random_size(rng)
    scale = min(1.0, 120 / math.sqrt(width * height))
    return resized((round(width * scale), round(height * scale)))


class Answerer(training.Trainee):
    """Learns to answer."""

    def forward(self, batch: training.Batch) -> torch.Tensor:
        """Mean cross-entropy over the tokens of answers."""
        hidden = self.hidden(batch)[:, :-1]
        logits = training.linear(hidden, self.model.lm_head).float()
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def check_batches(core: Tokenizer) -> list[training.Batch]:
    """Batches with one image and with two, to compare the training pass on."""
    rng, size = random.Random(5), (150, 210)
    draws = [data.picture_sample, data.comparison_sample, data.album_sample]
    return [collate(core, [draw(rng, size) for _ in range(3)], patches(size), rng) for draw in draws]


class TransformersAsk:
    """Answers samples with Transformers' own classes and greedy decoding, from a saved checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = loaded.eval().to(device)

    @torch.inference_mode()
    def __call__(self, samples: list[data.Sample]) -> list[str]:
        rows, pieces, grids = [], [], []
        for sample in samples:
            grid = (0, 0)
            for image in sample.images:
                picture = torch.from_numpy(pixels(image).copy())[None]
                grid = (picture.shape[1] // PATCH, picture.shape[2] // PATCH)
                grids.append((1, *grid))
                pieces.append(patchify(picture)[0])
            rows.append(encode_sample(self.core, sample, grid).ids)
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
        if pieces:
            inputs |= {"pixel_values": torch.cat(pieces), "image_grid_thw": torch.tensor(grids)}
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        found = self.model.generate(**moved, max_new_tokens=48, do_sample=False)[:, length:].tolist()
        return [self.core.decode([token for token in row if token not in (END, PAD)]) for row in found]


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    training.add_options(parser, seconds=520, batch=160, lr=1e-3)
    parser.add_argument("--dialogues", type=float, default=0.0, help="share of batches with tools or JSON")
    parser.add_argument("--freeze-vision", action="store_true", help="train the decoder alone")
    parser.add_argument("--small", type=float, default=0.0, help="share of images that are made small")
    options = parser.parse_args()
    model, core = training.prepare(options)
    trainee = Answerer(model)
    trainee.visual.requires_grad_(not options.freeze_vision)
    training.check_pass(trainee, check_batches(core))

    def keep() -> None:
        training.save(trainee, core, options.out)

    draw = Conversations(
        core, options.batch, options.dialogues, options.small, 8 if options.device == "cpu" else 64
    )
    training.fit(trainee, draw, options, start, keep)
    training.save(trainee, core, options.out)
    ask = TransformersAsk(options.out, torch.device(options.device))
    scores = eval_pocket.evaluate(ask, options.evaluate)
    (options.out / "training.json").write_text(
        json.dumps({"scores": scores, "torch": torch.__version__}, indent=1)
    )
    print(f"{time.monotonic() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
