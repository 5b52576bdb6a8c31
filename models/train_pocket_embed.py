"""Trains pocket-embed, which puts images and texts of the pocket scenes into one space, on one GPU.

    python -m models.train_pocket_embed --start-from models/pocket --out models/pocket-embed --seconds 240

See :mod:`models.training` for how.

The loss is symmetric InfoNCE with a learned temperature over the pairs of a batch. The model's own card,
``models/pocket-embed/README.md``, says what it is for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from models import eval_pocket_embed, training
from models.eval_pocket_embed import Item
from models.pairs import captioned_pairs
from models.pocket_format import IMAGE, PromptRow, patches, patchify, pixels, stack
from models.scenes import random_size

#: Of texts in training, how many come without the template.
BARE = 1 / 3


def encode_item(core: Tokenizer, item: Item, *, bare: bool = False) -> PromptRow:
    """An image or a text as the chat template puts a user's message; ``bare`` texts are left as they are."""
    row = PromptRow(core)
    if bare:
        assert isinstance(item, str)
        row.text(item)
        return row
    row.text("<|im_start|>user\n")
    if isinstance(item, str):
        row.text(item)
    else:
        row.picture(patches(item.size))
    row.text("<|im_end|>\n")
    return row


class PairBatches:
    """Draws batches of pairs: ``ids`` and the like of texts and, behind ``picture_``, of images."""

    def __init__(self, core: Tokenizer, batch_size: int) -> None:
        self.core, self.batch_size = core, batch_size

    def __call__(self, rng: random.Random) -> training.Batch:
        pairs = captioned_pairs(rng, self.batch_size, random_size(rng))
        texts = stack([encode_item(self.core, p.text, bare=rng.random() < BARE) for p in pairs], [])
        images = [pair.image for pair in pairs]
        seen = stack([encode_item(self.core, image) for image in images], images)
        return texts | {f"picture_{name}": value for name, value in seen.items()}


def picture_side(batch: training.Batch) -> training.Batch:
    """The images' own batch."""
    mark = "picture_"
    return {name.removeprefix(mark): value for name, value in batch.items() if name.startswith(mark)}


class Embedder(training.Trainee):
    """Learns to tell each image's text from the batch's others, and each text's image."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__(model)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=model.device))

    def vectors(self, batch: training.Batch) -> torch.Tensor:
        """float32 ``(B, hidden)`` of length 1: hidden states of last tokens."""
        last = batch["lengths"] - 1
        hidden = self.hidden(batch)
        pooled = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
        return F.normalize(pooled.float(), dim=-1)

    def forward(self, batch: training.Batch) -> torch.Tensor:
        """Symmetric InfoNCE, as CLIP's (arXiv:2103.00020, figure 3), its scale at most 100."""
        texts, pictures = self.vectors(batch), self.vectors(picture_side(batch))
        logits = texts @ pictures.T * self.log_scale.exp().clamp(max=100.0)
        right = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


class TransformersEmbed:
    """Embeds with Transformers' own classes, one item at a time, from a saved checkpoint."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self.core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        self.model = loaded.eval().to(device)

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        return torch.stack([self._one(item) for item in items]).cpu().numpy()

    @torch.inference_mode()
    def _one(self, item: Item) -> torch.Tensor:
        ids = torch.tensor([encode_item(self.core, item).ids])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
        if not isinstance(item, str):
            inputs |= {
                "pixel_values": patchify(torch.from_numpy(pixels(item).copy())[None])[0],
                "image_grid_thw": torch.tensor([[1, *patches(item.size)]]),
            }
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        # The last of these is the one after the final norm.
        hidden = self.model(**moved, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return F.normalize(hidden[0, -1].float(), dim=-1)


def check_batches(core: Tokenizer) -> list[training.Batch]:
    """Batches of texts and of images, to compare the training pass on."""
    batch = PairBatches(core, 4)(random.Random(5))
    return [batch, picture_side(batch)]


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    training.add_options(parser, seconds=240, batch=512, lr=6e-4)
    options = parser.parse_args()
    model, core = training.prepare(options)
    trainee = Embedder(model)
    training.check_pass(trainee, check_batches(core))
    training.fit(trainee, PairBatches(core, options.batch), options, start)
    training.save(trainee, core, options.out)
    embed = TransformersEmbed(options.out, torch.device(options.device))
    scores = eval_pocket_embed.evaluate(embed, options.evaluate)
    (options.out / "training.json").write_text(
        json.dumps({"scores": scores, "torch": torch.__version__}, indent=1)
    )
    print(f"{time.monotonic() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
