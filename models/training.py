"""What the trainings of all pocket models share: the training pass, the loop, and checkpoints.

The model is Transformers' own Qwen2-VL; only the training pass takes a shortcut: all pictures of a batch have
one size, so that the vision tower's attention is one dense batch instead of a loop over pictures. That
shortcut is compared with Transformers' forward first. Batches are drawn by worker processes while the GPU
trains.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration

from models.pocket_format import IMAGE, PATCH, VISION, make_model, make_tokenizer, patchify, write_text_files

Batch = dict[str, torch.Tensor]
Draw = Callable[[random.Random], Batch]


class Batches(IterableDataset):
    """Endless batches, each of pictures of one size. Every worker draws from seeds of its own."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            yield self.draw(rng)


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
    """The model, and its pass over batches of :func:`models.pocket_format.stack`."""

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

    def hidden(self, batch: Batch) -> torch.Tensor:
        """``(B, L, hidden)``, after the final norm."""
        embeds = self.language.embed_tokens(batch["ids"])
        if len(batch["pixels"]):
            rows = self.pictures(batch["pixels"]).to(embeds.dtype)
            embeds = embeds.masked_scatter((batch["ids"] == IMAGE)[..., None], rows)
        return self.language(
            inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False
        ).last_hidden_state


def take_shortcut(trainee: Trainee, batches: list[Batch]) -> None:
    """Put the dense attention in place, and see that logits stay those of Transformers' own forward."""
    device = trainee.language.embed_tokens.weight.device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    with torch.no_grad():
        wanted = []
        for batch in batches:
            inputs = {"input_ids": batch["ids"], "position_ids": batch["positions"]}
            if len(batch["pixels"]):
                grid = [size // PATCH for size in batch["pixels"].shape[1:3]]
                inputs |= {
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


def fit(trainee: nn.Module, draw: Draw, options: argparse.Namespace, start: float) -> None:
    """Lower ``trainee(batch)``, a mean loss, until ``options.seconds`` after ``start``."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    loader = iter(
        DataLoader(
            Batches(draw, options.seed),
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
            * min(1.0, (step + 1) / options.warmup)
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


def add_options(parser: argparse.ArgumentParser, *, seconds: float, batch: int, lr: float) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="until training stops, from the start on"
    )
    parser.add_argument("--start-from", type=Path, help="a pocket checkpoint, to be trained further")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; another one to train further")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--warmup", type=int, default=200, help="steps until the full learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--evaluate", type=int, default=100, help="questions per task, or pairs")
    parser.add_argument("--report", type=int, default=200, help="steps between lines of progress")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def prepare(options: argparse.Namespace) -> tuple[Qwen2VLForConditionalGeneration, Tokenizer]:
    """The model to train, in float32 on its device, and its tokenizer."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if options.start_from:
        # Its ids are what the weights know.
        core = Tokenizer.from_file(str(options.start_from / "tokenizer.json"))
        model = make_model(core)
        trained = Qwen2VLForConditionalGeneration.from_pretrained(options.start_from, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    else:
        core = make_tokenizer()
        model = make_model(core)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, vocabulary {core.get_vocab_size()}", flush=True)
    return model.to(options.device), core


def save(trainee: Trainee, core: Tokenizer, folder: Path) -> None:
    """The checkpoint in Hugging Face layout, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    trainee.model.to(torch.bfloat16).save_pretrained(folder)
    write_text_files(core, folder)
