"""Trains the pocket model from nothing, in one run of bounded time on one GPU.

    python -m models.train_pocket --out models/pocket --seconds 480

Pictures are drawn by worker processes while the GPU trains. The model is Transformers' own Qwen2-VL; only the
training pass takes a shortcut: all pictures of a batch have one size, so that the vision tower's attention is
one dense batch instead of a loop over pictures. That shortcut is compared with Transformers' forward first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration

from models import eval_pocket
from models import samples as data
from models.pocket_format import (
    END,
    IMAGE,
    PAD,
    PATCH,
    VISION,
    collate,
    encode_sample,
    make_model,
    make_tokenizer,
    patchify,
    pixels,
    resized,
    write_text_files,
)
from models.scenes import random_size


class Batches(IterableDataset):
    """Endless batches, each of pictures of one size. Every worker draws from seeds of its own."""

    def __init__(self, core: Tokenizer, batch_size: int, seed: int) -> None:
        self.core, self.batch_size, self.seed = core, batch_size, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            yield self.draw(rng)

    def draw(self, rng: random.Random) -> dict[str, torch.Tensor]:
        size = random_size(rng)
        w, h = resized(size)
        grid = (h // PATCH, w // PATCH)
        kind = rng.random()
        two = kind < 0.13
        # One number for all, or most of a batch would be padding.
        turns = rng.choice((1, 2, 3, 4))
        samples = []
        for _ in range(self.batch_size // 2 if two else self.batch_size):
            if two:
                draw = data.comparison_sample if kind < 0.1 else data.album_sample
                samples.append(draw(rng, size))
            elif rng.random() < 0.02:
                samples.append(data.chat_sample(rng))
            else:
                samples.append(data.picture_sample(rng, size, turns))
        return collate(self.core, samples, grid, rng)


class DenseVisionAttention(nn.Module):
    """Stands in for Transformers' module, with its very parameters, where all pictures have one size."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = original.qkv, original.proj, original.num_heads
        self.pictures = 1

    def forward(
        self, hidden_states: torch.Tensor, *_: object, position_embeddings: tuple, **__: object
    ) -> torch.Tensor:
        cos, sin = position_embeddings
        qkv = self.qkv(hidden_states).view(self.pictures, len(cos), 3, self.heads, -1)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, qkv[:, :, 2])))
        return self.proj(out.transpose(1, 2).reshape(hidden_states.shape))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn ``x`` (pictures, patches, 2, heads, dim) by angles (patches, dim), in the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (angles.to(x.dtype)[:, None, None] for angles in (cos, sin))
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


def vision_angles(grid: tuple[int, int], dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``(patches, dim)`` of one picture, in the order of its patches."""
    gh, gw = grid
    row = torch.arange(gh, device=device)[:, None].expand(gh, gw)
    column = torch.arange(gw, device=device)[None].expand(gh, gw)
    order = [x.reshape(gh // 2, 2, gw // 2, 2).transpose(1, 2).reshape(-1) for x in (row, column)]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim // 2, 2, device=device) / (dim // 2))
    angles = torch.cat([x[:, None] * frequencies for x in order], dim=1)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


class Trainee(nn.Module):
    """The model, and its training pass."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.visual, self.language = model.model.visual, model.model.language_model

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 ``(N, H, W, 3)`` to rows ``(N * H * W / 784, hidden)``."""
        grid = (images.shape[1] // PATCH, images.shape[2] // PATCH)
        x = patchify(images).flatten(0, 1)
        angles = vision_angles(grid, VISION["embed_dim"] // VISION["num_heads"], images.device)
        # The convolution's windows are the patches themselves.
        x = F.linear(x, self.visual.patch_embed.proj.weight.flatten(1))
        for block in self.visual.blocks:
            block.attn.pictures = len(images)
            x = block(x, cu_seqlens=None, position_embeddings=angles)
        return self.visual.merger(x)

    def hidden(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        embeds = self.language.embed_tokens(batch["ids"])
        if len(batch["pixels"]):
            rows = self.pictures(batch["pixels"]).to(embeds.dtype)
            embeds = embeds.masked_scatter((batch["ids"] == IMAGE)[..., None], rows)
        return self.language(
            inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False
        ).last_hidden_state

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the tokens of answers."""
        targets = batch["labels"][:, 1:]
        wanted = targets != -100
        logits = self.model.lm_head(self.hidden(batch)[:, :-1][wanted])
        return F.cross_entropy(logits.float(), targets[wanted])


def take_shortcut(trainee: Trainee, core: Tokenizer, device: torch.device) -> None:
    """Put the dense attention in place, and see that logits stay those of Transformers' own forward."""
    rng, size = random.Random(5), (150, 210)
    w, h = resized(size)
    grid = (h // PATCH, w // PATCH)
    draws = [data.picture_sample, data.comparison_sample, data.album_sample]
    batches = [
        {k: v.to(device) for k, v in collate(core, [draw(rng, size) for _ in range(3)], grid, rng).items()}
        for draw in draws
    ]
    with torch.no_grad():
        wanted = []
        for batch in batches:
            inputs = {
                "input_ids": batch["ids"],
                "position_ids": batch["positions"],
                "pixel_values": patchify(batch["pixels"]).flatten(0, 1),
                "image_grid_thw": torch.tensor([[1, *grid]] * len(batch["pixels"]), device=device),
                "mm_token_type_ids": (batch["ids"] == IMAGE).int(),
            }
            wanted.append(trainee.model(**inputs, use_cache=False).logits)
        for block in trainee.visual.blocks:
            block.attn = DenseVisionAttention(block.attn)
        for batch, logits in zip(batches, wanted, strict=True):
            found = trainee.model.lm_head(trainee.hidden(batch))
            live = torch.arange(found.shape[1], device=device) < batch["lengths"][:, None]
            error = (found[live] - logits[live]).norm() / logits[live].norm()
            assert error < 1e-3, f"the training pass is off by {error}"


def train(
    trainee: Trainee, core: Tokenizer, options: argparse.Namespace, device: torch.device, start: float
) -> None:
    cuda = device.type == "cuda"
    loader = iter(
        DataLoader(
            Batches(core, options.batch, options.seed),
            batch_size=None,
            num_workers=options.workers,
            prefetch_factor=3 if options.workers else None,
            pin_memory=cuda,
        )
    )
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=cuda)
    step, seen, skipped, losses, last = 0, 0, 0, [], time.monotonic()
    trainee.train()
    while (used := (time.monotonic() - start) / options.seconds) < 1.0:
        rate = (
            options.lr
            * min(1.0, (step + 1) / 200)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, used))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = trainee(batch)
        loss.backward()
        # A single overflow in half precision would poison every weight for good.
        if nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            optimizer.step()
        else:
            skipped += 1
            assert skipped < 100, "gradients are not finite any more"
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + len(batch["ids"])
        losses.append(loss.detach())
        if step % options.report == 0:
            now = time.monotonic()
            mean = torch.stack(losses).nanmean().item()
            pace = options.report / (now - last)
            print(
                f"{now - start:.0f} s step {step} samples {seen} loss {mean:.4f} {pace:.1f} step/s,"
                f" {skipped} skipped",
                flush=True,
            )
            losses, last = [], now
    print(f"trained {step} steps on {seen} samples", flush=True)


class TransformersAsk:
    """Answers samples with Transformers' own classes and greedy decoding, from a saved checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = loaded.eval().to(device)

    @torch.inference_mode()
    def __call__(self, samples: list[data.Sample]) -> list[str]:
        rows, patches, grids = [], [], []
        for sample in samples:
            grid = (0, 0)
            for image in sample.images:
                picture = torch.from_numpy(pixels(image).copy())[None]
                grid = (picture.shape[1] // PATCH, picture.shape[2] // PATCH)
                grids.append((1, *grid))
                patches.append(patchify(picture)[0])
            rows.append(encode_sample(self.core, sample, grid)[0])
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
        if patches:
            inputs |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        found = self.model.generate(**moved, max_new_tokens=48, do_sample=False)[:, length:].tolist()
        return [self.core.decode([token for token in row if token not in (END, PAD)]) for row in found]


def save(trainee: Trainee, core: Tokenizer, folder: Path) -> None:
    """The checkpoint in Hugging Face layout, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    trainee.model.to(torch.bfloat16).save_pretrained(folder)
    write_text_files(core, folder)


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="until training stops, from the start on")
    parser.add_argument("--start-from", type=Path, help="a checkpoint of this script, to be trained further")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; another one to train further")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--evaluate", type=int, default=100, help="questions per task")
    parser.add_argument("--report", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device(options.device)
    core = make_tokenizer()
    if options.start_from:
        # Its ids are what the weights know.
        core = Tokenizer.from_file(str(options.start_from / "tokenizer.json"))
    model = make_model(core)
    if options.start_from:
        model.load_state_dict(
            Qwen2VLForConditionalGeneration.from_pretrained(
                options.start_from, dtype=torch.float32
            ).state_dict()
        )
    trainee = Trainee(model.to(device))
    size = sum(p.numel() for p in trainee.parameters()) / 1e6
    print(f"{size:.2f} M parameters, vocabulary {core.get_vocab_size()}", flush=True)
    take_shortcut(trainee, core, device)
    train(trainee, core, options, device, start)
    save(trainee, core, options.out)
    scores = eval_pocket.evaluate(TransformersAsk(options.out, device), options.evaluate)
    (options.out / "training.json").write_text(
        json.dumps({"scores": scores, "torch": torch.__version__}, indent=1)
    )
    print(f"{time.monotonic() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
