"""Shared parts of all pocket models' training: the training pass, the loop, and checkpoints.

The model is Transformers' own Qwen2-VL; only the training pass takes a shortcut: all images of a batch
have one size, so that the vision tower's attention is one dense batch instead of a loop over images, and
what lies between matrix products goes over memory as few times as torch's own operations allow. The pass is
compared with Transformers' forward first.
Batches are drawn by worker processes while the GPU trains; where it is faster than they are, it trains on
recent batches again rather than wait.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration

from engine.graphs import Capture, Replay, make_capture
from models.pocket_format import (
    IMAGE,
    PATCH,
    TAGS,
    VISION,
    make_model,
    make_tokenizer,
    make_tool_tokenizer,
    patchify,
    write_text_files,
)

Batch = dict[str, torch.Tensor]
Draw = Callable[[random.Random], Batch]


class Batches(IterableDataset):
    """Endless batches, each of images of one size. Every worker draws from seeds of its own."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            yield self.draw(rng)


#: ``x * sigmoid(1.702 x)``, the towers' activation, is ``silu(1.702 x) / 1.702``.
_QUICK = 1.702


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn ``x`` ``(..., dim)`` by angles that broadcast with it; ``sin`` is negative in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def linear(x: torch.Tensor, layer: nn.Linear, inner: float = 1.0, outer: float = 1.0) -> torch.Tensor:
    """``outer * (x * inner @ weight.T + bias)`` in the dtype of ``x``; the weights keep theirs, and it is
    them that are scaled: they are smaller than what goes through them."""
    bias = None if layer.bias is None else (layer.bias * outer).to(x.dtype)
    return F.linear(x, (layer.weight * (inner * outer)).to(x.dtype), bias)


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)


def vision_block(x: torch.Tensor, block: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` ``(pictures, patches, width)``."""
    qkv = linear(layer_norm(x, block.norm1), block.attn.qkv)
    qkv = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(qkv[:2], cos, sin)
    out = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
    x = x + linear(out, block.attn.proj)
    inner = F.silu(linear(layer_norm(x, block.norm2), block.mlp.fc1, outer=_QUICK))
    return x + linear(inner, block.mlp.fc2, inner=1 / _QUICK)


def decoder_layer(x: torch.Tensor, layer: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` ``(B, L, width)``, causal; what follows a sequence's end is never looked at by the sequence."""
    attention, normed = layer.self_attn, rms_norm(x, layer.input_layernorm)
    dim = attention.head_dim
    q, k, v = (
        linear(normed, part).unflatten(-1, (-1, dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + linear(out, attention.o_proj)
    normed = rms_norm(x, layer.post_attention_layernorm)
    return x + linear(
        F.silu(linear(normed, layer.mlp.gate_proj)) * linear(normed, layer.mlp.up_proj), layer.mlp.down_proj
    )


def vision_angles(grid: tuple[int, int], dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``(patches, dim)`` of one image, in the order of its patches, for :func:`rotate`."""
    gh, gw = grid
    row = torch.arange(gh, device=device)[:, None].expand(gh, gw)
    column = torch.arange(gw, device=device)[None].expand(gh, gw)
    order = [x.reshape(gh // 2, 2, gw // 2, 2).transpose(1, 2).reshape(-1) for x in (row, column)]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim // 2, 2, device=device) / (dim // 2))
    return _waves(torch.cat([x[:, None] * frequencies for x in order], dim=1))


def text_angles(
    positions: torch.Tensor, axis: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``(B, 1, L, dim)`` of positions ``(3, B, L)``, for :func:`rotate`.

    Args:
        axis: ``(dim / 2,)`` int64, the axis of each angle.
        frequencies: ``(dim / 2,)``, angle per position.
    """
    return _waves((positions.permute(1, 2, 0)[..., axis] * frequencies)[:, None])


def _waves(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice as wide as ``angles``."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class Trainee(nn.Module):
    """The model, and its pass over batches of :func:`models.pocket_format.stack`.

    Attributes:
        dtype: of everything between layers; weights are kept in float32.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.visual, self.language = model.model.visual, model.model.language_model
        self.dtype = torch.float32
        rope, device = model.config.text_config.rope_parameters, model.device
        half = sum(rope["mrope_section"])
        self._axis = torch.repeat_interleave(torch.arange(3), torch.tensor(rope["mrope_section"])).to(device)
        self._frequencies = rope["rope_theta"] ** (-torch.arange(half, device=device) / half)
        self._vocabulary = torch.arange(model.config.text_config.vocab_size, device=device)

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 ``(N, H, W, 3)`` to rows ``(N * H * W / 784, hidden)``."""
        grid = (images.shape[1] // PATCH, images.shape[2] // PATCH)
        cos, sin = vision_angles(grid, VISION["embed_dim"] // VISION["num_heads"], images.device)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        # The convolution's windows are the patches themselves, and both frames of a patch are the image.
        weight = self.visual.patch_embed.proj.weight.sum(2).flatten(1).to(self.dtype)
        x = F.linear(patchify(images, frames=1).to(self.dtype), weight)
        for block in self.visual.blocks:
            x = vision_block(x, block, cos, sin)
        merger = self.visual.merger
        x = layer_norm(x, merger.ln_q).reshape(-1, merger.hidden_size)
        return linear(F.gelu(linear(x, merger.mlp[0])), merger.mlp[2])

    def hidden(self, batch: Batch) -> torch.Tensor:
        """``(B, L, hidden)``, after the final norm."""
        # As a matmul: the gradient of a lookup adds up rows one after the other where ids repeat.
        table = self.language.embed_tokens.weight.to(self.dtype)
        x = (batch["ids"][..., None] == self._vocabulary).to(self.dtype) @ table
        if len(batch["pixels"]):
            shape = x.shape
            rows = self.pictures(batch["pixels"])
            x = x.flatten(0, 1).index_copy(0, batch["picture_rows"], rows).view(shape)
        cos, sin = text_angles(batch["positions"], self._axis, self._frequencies)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        for layer in self.language.layers:
            x = decoder_layer(x, layer, cos, sin)
        return rms_norm(x, self.language.norm)


def check_pass(trainee: Trainee, batches: list[Batch]) -> None:
    """See that hidden states, and so logits, are those of Transformers' own forward."""
    device = trainee.language.embed_tokens.weight.device
    with torch.no_grad():
        for drawn in batches:
            batch = {name: value.to(device) for name, value in drawn.items()}
            inputs = {"input_ids": batch["ids"], "position_ids": batch["positions"]}
            if len(batch["pixels"]):
                grid = [size // PATCH for size in batch["pixels"].shape[1:3]]
                inputs |= {
                    "pixel_values": patchify(batch["pixels"]).flatten(0, 1),
                    "image_grid_thw": torch.tensor([[1, *grid]] * len(batch["pixels"]), device=device),
                    "mm_token_type_ids": (batch["ids"] == IMAGE).int(),
                }
            wanted = trainee.model(**inputs, use_cache=False).logits
            found = trainee.model.lm_head(trainee.hidden(batch))
            live = torch.arange(found.shape[1], device=device) < batch["lengths"][:, None]
            error = (found[live] - wanted[live]).norm() / wanted[live].norm()
            assert error < 1e-3, f"the training pass is off by {error}"


class ReplayBuffer:
    """Batches on a device: new ones as they come, and in between recent ones again, up to ``kept`` of them.

    Reading never waits once the first batch is there.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, kept: int) -> None:
        self._recent: list[Batch] = []
        self._device, self._kept = device, max(kept, 1)
        self._rng = random.Random(0)
        self._new: queue.Queue[Batch] = queue.Queue(2)
        self.fresh = 0
        # Ends with the process; the workers that feed it do too.
        threading.Thread(target=self._pull, args=(batches,), daemon=True).start()

    def _pull(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._new.put(batch)

    def next(self) -> Batch:
        try:
            drawn = self._new.get(block=not self._recent or self._kept == 1)
        except queue.Empty:
            return self._rng.choice(self._recent)
        batch = {key: value.to(self._device, non_blocking=True) for key, value in drawn.items()}
        if len(self._recent) < self._kept:
            self._recent.append(batch)
        else:
            self._recent[self.fresh % self._kept] = batch
        self.fresh += 1
        return batch


class Passes:
    """Forward and backward passes. They leave gradients, times the scaler's scale, in ``.grad``.

    Args:
        capture: captures passes over a shape of batch that comes again and again; else the host takes several
            times as long to launch the kernels as the device to run them. None runs every pass eagerly.
        patience: passes over a shape before it is captured.
    """

    def __init__(
        self, trainee: Trainee, scaler: torch.amp.GradScaler, capture: Capture | None, patience: int = 3
    ) -> None:
        self._trainee, self._scaler = trainee, scaler
        self._capture, self._patience = capture, patience
        self._gradients = []
        for parameter in trainee.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self._gradients.append(parameter.grad)
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, tuple[Batch, Replay]] = {}

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The loss, which the next call may overwrite."""
        key = tuple((name, tuple(value.shape)) for name, value in batch.items())
        self._seen[key] += 1
        if key not in self._captured:
            if self._capture is None or self._seen[key] <= self._patience:
                return self._run(batch)
            inputs = {name: value.clone() for name, value in batch.items()}
            self._captured[key] = inputs, self._capture(lambda: self._run(inputs))
        inputs, replay = self._captured[key]
        for name, value in batch.items():
            inputs[name].copy_(value, non_blocking=True)
        return replay()

    def _run(self, batch: Batch) -> torch.Tensor:
        torch._foreach_zero_(self._gradients)
        loss = self._trainee(batch)
        self._scaler.scale(loss).backward()
        return loss.detach()


def fit(
    trainee: Trainee,
    draw: Draw,
    options: argparse.Namespace,
    start: float,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Lower ``trainee(batch)``, a mean loss, until ``options.seconds`` after ``start``.

    Args:
        keep: called with each line of progress.
    """
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    loader = DataLoader(
        Batches(draw, options.seed),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=3 if options.workers else None,
        pin_memory=cuda,
    )
    replay = ReplayBuffer(loader, device, options.replay)
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=cuda)
    # Skips a step whose gradients are not finite, without the host having to look.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=1 << 30)
    if cuda:
        trainee.dtype = torch.bfloat16
    passes = Passes(trainee, scaler, make_capture(device, enforce_eager=False))
    step, seen, losses, last = 0, 0, [], time.monotonic()
    trainee.train()
    while (used := (time.monotonic() - start) / options.seconds) < 1.0:
        rate = (
            options.lr
            * min(1.0, (step + 1) / options.warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, used))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = replay.next()
        loss = passes(batch)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        step, seen = step + 1, seen + len(batch["ids"])
        losses.append(loss.clone())
        if step % options.report == 0:
            now = time.monotonic()
            mean = torch.stack(losses).nanmean().item()
            pace = options.report / (now - last)
            skipped = -math.log2(scaler.get_scale())
            print(
                f"{now - start:.0f} s step {step} samples {seen} loss {mean:.4f} {pace:.1f} step/s,"
                f" {replay.fresh / step:.0%} of the batches new, {skipped:.0f} skipped,"
                f" {passes.num_captured} shapes captured",
                flush=True,
            )
            losses, last = [], now
            keep()
    print(f"trained {step} steps on {seen} samples, {replay.fresh / step:.0%} of them new", flush=True)


def add_options(parser: argparse.ArgumentParser, *, seconds: float, batch: int, lr: float) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="until training stops, from the start on"
    )
    parser.add_argument("--start-from", type=Path, help="a pocket checkpoint, to be trained further")
    parser.add_argument("--grow", action="store_true", help="give that checkpoint the tokens that it lacks")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; another one to train further")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--warmup", type=int, default=200, help="steps until the full learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--replay", type=int, default=256, help="recent batches kept, to train on again")
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
        model = Qwen2VLForConditionalGeneration.from_pretrained(options.start_from, dtype=torch.float32)
        if options.grow:
            core = grow(model, core)
    else:
        core = make_tokenizer()
        model = make_model(core)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, vocabulary {core.get_vocab_size()}", flush=True)
    return model.to(options.device), core


def grow(model: Qwen2VLForConditionalGeneration, core: Tokenizer) -> Tokenizer:
    """Give ``model`` embeddings of the tokens for calls and JSON that ``core`` lacks.

    A new word starts as the same word behind a space, where there is one, any other new token as the mean of
    the tokens that spelled it before.

    Returns:
        the larger tokenizer.
    """
    larger = make_tool_tokenizer()
    ids = larger.get_vocab()
    assert core.get_vocab().items() <= ids.items(), "the checkpoint's tokens have other ids"
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    table = model.get_input_embeddings().weight
    bytes_of = decoders.ByteLevel()
    with torch.no_grad():
        for token, index in ids.items():
            if index >= core.get_vocab_size():
                text = token if token in TAGS else bytes_of.decode([token])
                same = core.token_to_id(f"\u0120{token}")
                parts = core.encode(text, add_special_tokens=False).ids if same is None else [same]
                table[index] = table[parts].mean(0)
    return larger


def save(trainee: Trainee, core: Tokenizer, folder: Path) -> None:
    """The checkpoint in Hugging Face layout, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(trainee.model).to(torch.bfloat16)
    model.config.text_config.dtype = model.config.vision_config.dtype = None
    model.save_pretrained(folder)
    write_text_files(core, folder)
