"""The one vision transformer. It attends within segments of a flat batch of patches, wherever from."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext

import torch
from torch import nn

from engine.graphs import Recorder
from engine.kernels.dispatch import use_triton
from engine.kernels.launch import compiling
from engine.kernels.rotary import rotary
from engine.kernels.vision_attention import vision_attention
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear, qkv_linear
from engine.layers.mlp import MLP, GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm
from engine.vision.graphs import TowerGraphs
from engine.vision.segments import VisionSegments
from engine.vision.transformer_config import VisionConfig

#: Blocks that are launched by themselves where passes are recorded. To launch a recording of all takes the
#: host 0.7 ms; these take the device about as long for a picture of 1600 patches.
_FIRST_BLOCKS = 4

#: What a block gives to the next, the tokens and the residual beside them, and the outputs to be kept so far.
_State = tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]


def make_norm(config: VisionConfig, width: int, build: BuildContext) -> LayerNorm | RMSNorm:
    """The tower's kind of norm over ``width``."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(width, config.norm_eps, build)


class VisionAttention(nn.Module):
    """Full attention within each segment."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = qkv_linear(
            config.hidden_size,
            config.num_heads,
            config.num_heads,
            config.head_dim,
            build,
            bias=True,
            fused_name="qkv",
        )
        self.proj = Linear(config.hidden_size, config.hidden_size, build)

    def forward(self, x: torch.Tensor, segments: VisionSegments, index: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        if index is not None:
            assert segments.cos is not None and segments.sin is not None
            rotary(q, k, index, segments.cos, segments.sin)
        out = vision_attention(
            q, k, v, segments.cu_seqlens, max_len=segments.max_len, scale=self.head_dim**-0.5
        )
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP. The residual travels beside the hidden states, as in the decoder."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.norm1 = make_norm(config, config.hidden_size, build)
        self.attn = VisionAttention(config, build)
        self.norm2 = make_norm(config, config.hidden_size, build)
        self.mlp: nn.Module
        if config.gated_mlp:
            self.mlp = GatedMLP(
                config.hidden_size, config.intermediate_size, config.activation, build, bias=True
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.activation, build)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        segments: VisionSegments,
        index: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.norm1.add(x, residual)
        normed, residual = self.norm2.add(self.attn(normed, segments, index), residual)
        return self.mlp(normed), residual


class VisionTransformer(nn.Module):
    """Flattened patches ``(N, patch_dim)`` to features ``(N, hidden_size)``.

    Args:
        keep: blocks whose outputs are wanted beside the last one's, ascending.
    """

    def __init__(self, config: VisionConfig, build: BuildContext, *, keep: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.keep = config, keep
        self._graphs: TowerGraphs | None = None
        width = config.hidden_size
        self.patch_embed = Linear(config.patch_dim, width, build, bias=config.patch_bias)
        self.class_embedding = build.parameter(width) if config.class_token else None
        self.position_embedding = (
            build.parameter(config.num_positions, width) if config.num_positions else None
        )
        self.pre_norm = make_norm(config, width, build) if config.pre_norm else None
        self.blocks = nn.ModuleList(VisionBlock(config, build) for _ in range(config.num_layers))
        self.post_norm = make_norm(config, width, build) if config.post_norm else None

    def forward(self, patches: torch.Tensor, segments: VisionSegments) -> torch.Tensor:
        """Patches in the model's dtype. Where there is a class token, images are of equal size, it is put
        before each, and ``cu_seqlens`` and the result count it."""
        x = self.states(patches, segments)[-1]
        return x if self.post_norm is None else self.post_norm(x)

    def states(
        self,
        patches: torch.Tensor,
        segments: VisionSegments,
        *,
        windows: VisionSegments | None = None,
        positions: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The outputs ``(N, hidden_size)`` of the blocks ``keep``, and of the last one.

        Where passes are recorded, the next one may overwrite them.

        Args:
            windows: what the blocks outside of ``full_layers`` attend within; None: the segments.
            positions: ``(N, hidden_size)``, added to the embedded patches.
        """
        x = self.embed(patches, segments)
        if positions is not None:
            x = x + positions
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if self._graphs is not None and self._graphs.fits(x, segments, windows):
            return self._graphs.replay(x, segments, windows)
        return self._other_blocks(self._first_blocks(x, segments, windows), segments, windows)

    def record(
        self,
        record: Recorder,
        *,
        window_len: int | None = None,
        rehearse: Callable[[], object],
    ) -> None:
        """Record passes through the blocks for few pictures.

        Args:
            window_len: most tokens of a window; None: there are none.
            rehearse: encodes a picture, so that the kernels around the blocks are compiled beforehand, too.
        """
        weight = self.patch_embed.weight
        self._graphs = TowerGraphs(
            [self._first_blocks, self._other_blocks],
            record,
            width=self.config.hidden_size,
            angles=None if self.config.rope_theta is None else self.config.head_dim // 2,
            window_len=window_len,
            dtype=weight.dtype,
            device=weight.device,
        )
        with torch.inference_mode():
            with compiling() if use_triton(weight) else nullcontext():
                self._graphs.rehearse(rehearse)
            self._graphs.capture()

    def _first_blocks(
        self, x: torch.Tensor, segments: VisionSegments, windows: VisionSegments | None
    ) -> _State:
        """``x`` ``(N, hidden_size)`` through the first blocks."""
        return self._through(self.blocks[:_FIRST_BLOCKS], 0, (x, None, []), segments, windows)

    def _other_blocks(
        self, state: _State, segments: VisionSegments, windows: VisionSegments | None
    ) -> list[torch.Tensor]:
        """What :meth:`_first_blocks` gave through the others; what :meth:`states` returns."""
        blocks = self.blocks[_FIRST_BLOCKS:]
        x, residual, kept = self._through(blocks, _FIRST_BLOCKS, state, segments, windows)
        return [*kept, x if residual is None else x + residual]

    def _through(
        self,
        blocks: Iterable[nn.Module],
        first: int,
        state: _State,
        segments: VisionSegments,
        windows: VisionSegments | None,
    ) -> _State:
        x, residual, kept = state
        # One row of the rotary tables per token: its row number is its position.
        index = None if segments.cos is None else torch.arange(len(x), device=x.device)
        full = self.config.full_layers
        for layer, block in enumerate(blocks, first):
            within = segments if windows is None or full is None or layer in full else windows
            x, residual = block(x, residual, within, index)
            if layer in self.keep:
                kept = [*kept, x + residual]
        return x, residual, kept

    def embed(self, patches: torch.Tensor, segments: VisionSegments) -> torch.Tensor:
        """Patch projection, class token and learned positions."""
        x = self.patch_embed(patches)
        if self.class_embedding is not None:
            images = len(segments.cu_seqlens) - 1
            token = self.class_embedding.expand(images, 1, -1)
            x = torch.cat([token, x.unflatten(0, (images, -1))], dim=1).flatten(0, 1)
        if self.position_embedding is not None:
            table: torch.Tensor = self.position_embedding
            if segments.positions is not None:
                table = table[segments.positions]
            x = (x.unflatten(0, (-1, len(table))) + table).flatten(0, 1)
        return x

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        slots = []
        if self.class_embedding is not None:
            slots.append(plain_slot(prefix + "class_embedding", self.class_embedding))
        if self.position_embedding is not None:
            slots.append(plain_slot(prefix + "position_embedding", self.position_embedding))
        return slots
