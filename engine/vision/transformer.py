"""The vision transformer of all families: attention within segments of a flat batch of patches."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.graphs import Capture
from engine.kernels.device import use_triton
from engine.kernels.dispatch import vision_attention
from engine.kernels.fp8 import RoundedRows
from engine.kernels.launch import compiling
from engine.kernels.rotary import RotaryTable, rotary
from engine.kernels.shares import part_counters
from engine.layers.build import BuildContext, Region, Target, WeightSlot, plain_slot
from engine.layers.linear import FusedColumnLinear, Linear, qkv_linear
from engine.layers.matrix_formats import Formats
from engine.layers.mlp import MLP, GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm
from engine.vision.graphs import ImageSource, TowerGraphs
from engine.vision.grid_conv import GridConv
from engine.vision.sandwich import SandwichBlock
from engine.vision.segments import VisionSegments
from engine.vision.transformer_config import VisionConfig

#: Number of blocks in the first CUDA graph. Launching one graph of all blocks takes the host 0.7 ms. With an
#: image of 1600 patches these blocks keep the device busy as long, which hides the other launches.
_FIRST_BLOCKS = 4

#: Number of blocks in each further graph, between which other work may use the device: about a millisecond
#: with an image of 1600 patches.
_NEXT_BLOCKS = 7

#: Patches times blocks between two pauses of an eager pass.
_PIECE = 1600 * _NEXT_BLOCKS

#: The hidden states and the residual between two blocks, and the outputs kept so far.
_State = tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]


def make_norm(config: VisionConfig, width: int, build: BuildContext) -> LayerNorm | RMSNorm:
    """A norm of the tower's kind over ``width`` features."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(width, config.norm_eps, build)


class VisionAttention(nn.Module):
    """Full attention within each segment."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_heads = config.num_kv_heads or config.num_heads
        self.heads = [config.num_heads, kv_heads, kv_heads]
        self.qkv = qkv_linear(
            config.hidden_size,
            config.num_heads,
            kv_heads,
            config.head_dim,
            replace(build, formats=Formats(every=build.tower)),
            bias=config.bias if config.qkv_bias is None else config.qkv_bias,
            fused_name="qkv",
        )
        width = config.head_dim if config.qk_norm_each else config.num_heads * config.head_dim
        self.each = config.qk_norm_each
        eps = config.qk_norm_eps
        self.q_norm = None if eps is None else RMSNorm(width, eps, build)
        self.k_norm = None if eps is None else RMSNorm(width, eps, build)
        self.proj = Linear(
            config.hidden_size, config.hidden_size, build, bias=config.bias, stored=build.tower
        )
        self.counters: torch.Tensor
        self.register_buffer("counters", part_counters(build.device), persistent=False)

    @property
    def projection(self) -> FusedColumnLinear:
        """The layer that gets the block's input."""
        return self.qkv

    def forward(
        self, x: torch.Tensor | RoundedRows, segments: VisionSegments, index: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            if not self.each:
                q, k = q.flatten(1), k.flatten(1)
            normed = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
            q, k = (part.view(len(v), -1, self.head_dim) for part in normed)
        if index is not None:
            assert segments.cos is not None and segments.sin is not None
            rotary(q, k, index, RotaryTable(segments.cos, segments.sin))
        if self.heads[1] < self.heads[0]:
            shared = self.heads[0] // self.heads[1]
            k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        return self.proj(self.attended(q, k, v, segments).flatten(1))

    def attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VisionSegments
    ) -> torch.Tensor:
        """Compute attention ``(N, heads, head_dim)`` of queries, keys and values of that shape."""
        return vision_attention(
            q,
            k,
            v,
            segments.cu_seqlens,
            max_len=segments.max_len,
            scale=self.head_dim**-0.5,
            counters=self.counters,
        )


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP. The residual is passed beside the hidden states, as in the decoder.

    Args:
        attention: the class of the attention, or of what stands in its place.
    """

    def __init__(
        self,
        config: VisionConfig,
        build: BuildContext,
        attention: type[VisionAttention | GridConv] = VisionAttention,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(config, config.hidden_size, build)
        self.attn = attention(config, build)
        self.norm2 = make_norm(config, config.hidden_size, build)
        self.mlp: MLP | GatedMLP
        if config.gated_mlp:
            self.mlp = GatedMLP(
                config.hidden_size,
                config.intermediate_size,
                config.activation,
                replace(build, formats=Formats(every=build.tower)),
                bias=config.bias if config.mlp_bias is None else config.mlp_bias,
            )
        else:
            self.mlp = MLP(
                config.hidden_size, config.intermediate_size, config.activation, build, stored=build.tower
            )
        self.scale1 = build.parameter(config.hidden_size) if config.layer_scale else None
        self.scale2 = build.parameter(config.hidden_size) if config.layer_scale else None

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        segments: VisionSegments,
        index: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = _normed(self.norm1, x, residual, self.attn.projection)
        attended = self.attn(normed, segments, index)
        if self.scale1 is not None:
            attended = attended * self.scale1
        normed, residual = _normed(self.norm2, attended, residual, self.mlp)
        out = self.mlp(normed)
        return out if self.scale2 is None else out * self.scale2, residual

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        if self.scale1 is None or self.scale2 is None:
            return []
        return [plain_slot(prefix + "scale1", self.scale1), plain_slot(prefix + "scale2", self.scale2)]


def _normed(
    norm: LayerNorm | RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    layer: FusedColumnLinear | Linear | MLP | GatedMLP,
) -> tuple[torch.Tensor | RoundedRows, torch.Tensor]:
    """Return the norm of ``x + residual``, in fp8 where the next layer takes it so, and that sum."""
    return norm.add_rounded(x, residual) if layer.takes_rounded(x) else norm.add(x, residual)


class PatchEmbed(Linear):
    """The projection of patches ``(N, patch_dim)``, whose channels come before frames."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__(config.patch_dim, config.hidden_size, build, bias=config.patch_bias)
        self.frames = config.patch_frames

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        whole, *others = super().weight_slots(prefix, names)
        if self.frames == 1:
            return [whole, *others]
        weight, size = self.weight.data, self.weight.shape[1] // (3 * self.frames)

        def columns(piece: int) -> slice:
            return slice(piece * size, (piece + 1) * size)

        copies: list[tuple[Region, Target]] = [
            (
                (slice(0, weight.shape[0]), columns(frame * 3 + colour)),
                weight[:, columns(colour * self.frames + frame)],
            )
            for frame in range(self.frames)
            for colour in range(3)
        ]
        return [WeightSlot(prefix + "weight", tuple(weight.shape), copies), *others]


def _make_block(config: VisionConfig, layer: int, build: BuildContext) -> VisionBlock | SandwichBlock:
    if config.sandwich:
        return SandwichBlock(config, build)
    convolves = config.conv is not None and layer in config.conv.layers
    return VisionBlock(config, build, GridConv if convolves else VisionAttention)


class VisionTransformer(nn.Module):
    """Computes features ``(N, out_features)`` from flat patches ``(N, patch_dim)``.

    Args:
        keep: blocks whose outputs :meth:`states` returns beside the last block's, ascending.

    Attributes:
        pause: called between pieces of a pass, each of which keeps the device busy for about a millisecond.
        expects_crowds: :meth:`capture_graphs` captures batches of several images, too.
    """

    expects_crowds = False

    def __init__(self, config: VisionConfig, build: BuildContext, *, keep: tuple[int, ...] = ()) -> None:
        super().__init__()
        assert not (keep and config.features), "the caller takes either states or features"
        last = config.num_layers - 1
        self.config = config
        self.keep = keep or tuple(sorted({state - 1 for state in config.features} - {last}))
        self._graphs: TowerGraphs | None = None
        # Whether the graphs take patches.
        self._embeds_captured = False
        self.pause: Callable[[], None] = lambda: None
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config, build)
        self.class_embedding = build.parameter(width) if config.class_token else None
        self.position_embedding = (
            build.parameter(config.num_positions, width) if config.num_positions else None
        )
        self.pre_norm = make_norm(config, width, build) if config.pre_norm else None
        self.blocks = nn.ModuleList(_make_block(config, layer, build) for layer in range(config.num_layers))
        self.post_norm = make_norm(config, width, build) if config.post_norm else None

    def forward(self, patches: torch.Tensor, segments: VisionSegments) -> torch.Tensor:
        """Features of patches in the model's dtype.

        A class token is put before each image's patches; ``cu_seqlens`` and the result count it, and all
        images have one size.
        """
        states = self.states(patches, segments)
        if self.config.features:
            outputs = dict(zip([*self.keep, self.config.num_layers - 1], states, strict=True))
            return torch.cat([outputs[state - 1] for state in self.config.features], dim=-1)
        return states[-1] if self.post_norm is None else self.post_norm(states[-1])

    def states(
        self,
        patches: torch.Tensor,
        segments: VisionSegments,
        *,
        windows: VisionSegments | None = None,
        positions: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Outputs ``(N, hidden_size)`` of the blocks ``keep`` and of the last block; -1 in ``keep`` is the
        input of the first block.

        After :meth:`capture_graphs` the next call may overwrite them.

        Args:
            windows: segments for the blocks that are not in ``full_layers``; None: ``segments`` for all.
            positions: ``(N, hidden_size)``, added to the embedded patches.
        """
        graphs = self._graphs
        if graphs is not None and self._embeds_captured and graphs.fits(patches, segments, windows):
            assert positions is None
            return graphs.replay(patches, segments, windows, self.pause)
        x, last = self.embed(patches, segments), self.config.positions_last
        if not last:
            x = self._at_positions(x, segments, positions)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if last:
            x = self._at_positions(x, segments, positions)
        if graphs is not None and not self._embeds_captured and graphs.fits(x, segments, windows):
            return graphs.replay(x, segments, windows, self.pause)
        state = self._through(self._begin(x), 0, len(self.blocks), segments, windows, self.pause)
        return self._outputs(state)

    def takes_image(self, tokens: int) -> bool:
        """Return whether :meth:`image_states` takes an image of so many patches."""
        return self._graphs is not None and self._graphs.fits_image(tokens)

    def image_states(self, pixels: np.ndarray, segments: VisionSegments) -> list[torch.Tensor]:
        """:meth:`states` of one image, which is one segment, from its pixels on.

        Args:
            pixels: as the image source of :meth:`capture_graphs` takes them.
        """
        assert self._graphs is not None
        return self._graphs.replay_image(pixels, segments.max_len, segments, self.pause)

    def begin(self, patches: torch.Tensor, segments: VisionSegments) -> torch.Tensor:
        """Map patches to the input ``(N, hidden_size)`` of the first block."""
        x = self._at_positions(self.embed(patches, segments), segments, None)
        return x if self.pre_norm is None else self.pre_norm(x)

    def run_blocks(self, x: torch.Tensor, segments: VisionSegments, first: int, end: int) -> torch.Tensor:
        """Run ``x`` ``(N, hidden_size)`` through the blocks from ``first`` to before ``end``, eagerly."""
        out, residual, _ = self._through((x, None, []), first, end, segments, None, self.pause)
        return out if residual is None else out + residual

    def capture_graphs(
        self,
        capture: Capture,
        *,
        window_len: int | None = None,
        positions: bool = True,
        image: ImageSource | None = None,
        rehearse: Callable[[], object],
    ) -> None:
        """Capture the forward pass for small batches: the blocks, and the patches' projection before them
        where nothing but a norm comes in between.

        Args:
            window_len: most tokens of a window; None if there are no windows.
            positions: whether the caller adds some to the embedded patches.
            image: makes patches of one image; for callers that add no positions, and :meth:`image_states`.
            rehearse: encodes an image, so that the kernels around the blocks are compiled before too.
        """
        weight = self.patch_embed.weight
        added = self.class_embedding is not None or self.position_embedding is not None or positions
        self._embeds_captured = not added
        count = len(self.blocks)
        ends = [*range(min(_FIRST_BLOCKS, count), count, _NEXT_BLOCKS), count]
        self._graphs = TowerGraphs(
            [partial(self._part, first, end) for first, end in pairwise([0, *ends])],
            capture,
            width=self.config.hidden_size if added else self.config.patch_dim,
            angles=None if self.config.rope_theta is None else self.config.head_dim // 2,
            window_len=window_len,
            dtype=weight.dtype,
            device=weight.device,
            crowds=self.expects_crowds,
            image=None if added else image,
        )
        with torch.inference_mode():
            with compiling() if use_triton(weight) else nullcontext():
                self._graphs.rehearse(rehearse)
            self._graphs.capture_all()

    def _part(
        self, first: int, end: int, given: Any, segments: VisionSegments, windows: VisionSegments | None
    ) -> Any:
        """Run the blocks from ``first`` to before ``end``.

        Args:
            given: the input of the first block or the patches, or what the part before has returned.

        Returns:
            As :meth:`states`, or a state for the next part.
        """
        if first:
            state = given
        else:
            state = self._begin(self.begin(given, segments) if self._embeds_captured else given)
        state = self._through(state, first, end, segments, windows)
        return state if end < len(self.blocks) else self._outputs(state)

    def _begin(self, x: torch.Tensor) -> _State:
        return x, None, [x] if -1 in self.keep else []

    @staticmethod
    def _outputs(state: _State) -> list[torch.Tensor]:
        x, residual, kept = state
        return [*kept, x if residual is None else x + residual]

    def _through(
        self,
        state: _State,
        first: int,
        end: int,
        segments: VisionSegments,
        windows: VisionSegments | None,
        pause: Callable[[], None] | None = None,
    ) -> _State:
        x, residual, kept = state
        # The rotary tables have a row per token: a token's position in them is its index.
        index = None if segments.cos is None else torch.arange(len(x), device=x.device)
        full = self.config.full_layers
        work = 0
        for layer in range(first, end):
            if pause is not None and work >= _PIECE:
                pause()
                work = 0
            within = segments if windows is None or full is None or layer in full else windows
            x, residual = self.blocks[layer](x, residual, within, index)
            if layer in self.keep:
                kept = [*kept, x + residual]
            work += len(x)
        return x, residual, kept

    def embed(self, patches: torch.Tensor, segments: VisionSegments) -> torch.Tensor:
        """Patch projection and class token."""
        x = self.patch_embed(patches)
        if self.class_embedding is not None:
            images = len(segments.cu_seqlens) - 1
            token = self.class_embedding.expand(images, 1, -1)
            x = torch.cat([token, x.unflatten(0, (images, -1))], dim=1).flatten(0, 1)
        return x

    def _at_positions(
        self, x: torch.Tensor, segments: VisionSegments, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """``x`` with the learned positions and those of the caller."""
        if self.position_embedding is not None:
            table: torch.Tensor = self.position_embedding
            if segments.positions is not None:
                table = table[segments.positions]
            x = (x.unflatten(0, (-1, len(table))) + table).flatten(0, 1)
        return x if positions is None else x + positions

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        slots = []
        if self.class_embedding is not None:
            slots.append(plain_slot(prefix + "class_embedding", self.class_embedding))
        if self.position_embedding is not None:
            slots.append(plain_slot(prefix + "position_embedding", self.position_embedding))
        return slots
