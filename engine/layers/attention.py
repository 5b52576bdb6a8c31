"""Causal self-attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Container
from functools import partial

import torch
from torch import nn

from engine.errors import ConfigError
from engine.kernels.dispatch import decode_attention, paged_attention
from engine.kernels.fp8 import FP8
from engine.kernels.kv_write import rotary_kv_write
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.rms_norm import HeadNorms, head_norms
from engine.kernels.rotary import RotaryTable, rotary
from engine.kernels.sigmoid_gate import sigmoid_gate
from engine.kernels.split_sums import SplitSums, Unfinished
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.decoder_config import DecoderConfig
from engine.layers.heads_norm import HeadLayerNorms, HeadsNorm
from engine.layers.linear import RowLinear, qkv_linear
from engine.layers.norm import RMSNorm, UnitNorm
from engine.layers.rotary import Rotary

_QKNorm = RMSNorm | UnitNorm | HeadsNorm | HeadLayerNorms
#: Norms that no other kernel computes.
_UNFUSED = HeadsNorm, HeadLayerNorms


class Attention(nn.Module):
    """One attention block.

    In order: norm, fused qkv projection, optional norms of queries, keys and values, rotation, write to the
    KV cache, attention over the cache, optional gate, output projection. Some models have the norms of
    queries and keys behind the rotation. A layer that borrows keys and values has queries alone, and writes
    nothing.
    """

    def __init__(self, config: DecoderConfig, layer: int, rotary: Rotary, build: BuildContext) -> None:
        super().__init__()
        heads, (kv_heads, self.head_dim) = config.num_heads, config.heads_of(layer)
        borrows = config.keys_of(layer) != layer
        #: The projection of keys is that of values.
        self.joint = config.keys_are_values and layer not in config.local_layers
        self.qkv_proj = qkv_linear(
            config.hidden_size,
            heads,
            kv_heads,
            self.head_dim,
            build,
            bias=config.qkv_bias,
            gated=config.output_gate,
            gate_apart=config.gate_apart,
            head_gate=config.head_gate,
            names=() if borrows else ("k_proj",) if self.joint else ("k_proj", "v_proj"),
        )
        self.o_proj = RowLinear(
            heads * self.head_dim, config.hidden_size, build.at("o_proj"), bias=config.o_bias
        )
        norm = partial(RMSNorm, self.head_dim, config.rms_norm_eps, build, offset=config.norm_offset)
        self.q_norm: _QKNorm | None = norm() if config.qk_norm else None
        self.k_norm: _QKNorm | None = norm() if config.qk_norm and not borrows else None
        if config.qk_norm_whole or config.qk_layer_norm:
            self.q_norm, self.k_norm = (
                HeadLayerNorms(part, self.head_dim, config.rms_norm_eps, build)
                if config.qk_layer_norm
                else HeadsNorm(part, config.rms_norm_eps, config.norm_offset, build)
                for part in self.qkv_proj.parts[:2]
            )
        if config.qk_unit_norm:
            self.q_norm = self.k_norm = UnitNorm(self.head_dim, config.rms_norm_eps, build)
        self.norms_last = config.qk_norm_last
        self.v_norm = None
        if config.value_norm and not borrows:
            self.v_norm = UnitNorm(self.head_dim, config.rms_norm_eps, build)
        self.gated, self.gate_apart = config.output_gate, config.gate_apart
        #: Heads of the rank with a gate of one number.
        self.head_gates = self.qkv_proj.parts[-1].size if config.head_gate else 0
        self.sizes = [part.size for part in self.qkv_proj.parts]
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.window = config.window(layer)
        self.cap = config.attention_cap
        self.rotary = rotary
        #: Of keys and of values in fp8. They are read once, on the host.
        self._kv_scales = torch.ones(2)
        #: One for each KV head of the rank, in place of these.
        self.head_scales: torch.Tensor | None
        ones = None
        if build.formats is not None and build.formats.head_scales:
            if config.num_borrowing or config.keys_are_values:
                raise ConfigError("scales of each head of keys and values are not supported for this model")
            heads = self.qkv_proj.parts[1].size // self.head_dim
            ones = torch.ones((2, heads), dtype=torch.float32, device=build.device)
        self.register_buffer("head_scales", ones, persistent=False)

    def kv_scales(self) -> tuple[float, float]:
        """The factors of keys and values in an fp8 cache; 1 if the checkpoint has no scales, or has them for
        each head, see :meth:`forward`."""
        key, value = self._kv_scales.tolist()
        return key, value

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        """Describe the scales of keys and values, where the checkpoint has some."""
        total, own = 1, slice(0, 1)
        targets = self._kv_scales[:, None]
        if self.head_scales is not None:
            keys = self.qkv_proj.parts[1]
            total, targets = keys.total // self.head_dim, self.head_scales
            own = slice(keys.start // self.head_dim, (keys.start + keys.size) // self.head_dim)
        return [
            WeightSlot(prefix + name, (total,), [((own,), targets[index])], reshape=True)
            for index, letter in enumerate("kv")
            for name in (f"{letter}_scale", f"{letter}_proj.{letter}_scale")
            if prefix + name in names
        ]

    def forward(
        self,
        norm: RMSNorm | None,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | SplitSums, torch.Tensor]:
        """Compute ``attention(norm(x + residual))`` and write the keys and values of all ``T`` tokens.

        Args:
            norm: the norm before this block; None for none.
            x: ``(T, hidden)``, output of the previous block.
            residual: ``(T, hidden)``, or None before the first block.
            positions, cache, meta: see :meth:`engine.layers.decoder.Decoder.forward`.
            rows: int64 ``(R,)``, the tokens whose output is needed; None for all.

        Returns:
            The output and ``x + residual``, both ``(T, hidden)``, or ``(R, hidden)`` for ``rows``.
        """
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        if rows is not None:
            residual = residual.index_select(0, rows)
        return self.attend(qkv, positions, cache, meta, rows), residual

    def attend(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor | SplitSums:
        """Compute the output ``(T, hidden)``, or ``(R, hidden)``, from what ``qkv_proj`` gives for ``T``
        tokens; see :meth:`forward`."""
        # Behind gates there may be padding.
        split = (qkv[:, : sum(self.sizes)] if self.head_gates else qkv).split(self.sizes, dim=-1)
        if self.head_gates:
            *split, gates = split
            gate = gates[..., None]
        if isinstance(self.q_norm, _UNFUSED) and isinstance(self.k_norm, _UNFUSED):
            split = self.q_norm(split[0]), self.k_norm(split[1]), split[2]
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in split]
        q, k, v = (*parts, None, None)[:3]
        if self.joint:
            v = k
        if self.v_norm is not None and v is not None:
            v = self.v_norm(v)
        if self.gate_apart:
            gate = parts[-1]
        elif self.gated:
            q, gate = q[:, ::2], q[:, 1::2]
        scales = self.head_scales if cache.keys.dtype == FP8 else None
        decode = meta.max_query_len == 1
        norms, table = self._norms(), self.rotary.table
        # The kernel that rotates does the norms as well, where nothing comes between.
        scaled = self.rotary.query_scale is not None or scales is not None
        if norms is not None and k is not None and scaled:
            if norms.last:
                rotary(q, k, positions, table)
            q, k = head_norms(q, k, norms)
            if norms.last:
                # That kernel rotates as well: by angles of 0 here.
                table, positions = self.rotary.still, positions if positions.dim() == 1 else positions[0]
            norms = None
        if self.rotary.query_scale is not None:
            # The rotation that follows doesn't mind a factor.
            q = q * self.rotary.query_scale[positions]
        if scales is not None:
            # The cache has the heads divided by their scales. Scores and sums are linear in them, so the
            # queries and the result are multiplied, each rounded once more.
            q = _times(q, scales[0])
            k, v = _times(k, 1 / scales[0]), _times(v, 1 / scales[1])
        if decode:
            out = self._decode(q, k, v, positions, table, cache, meta, norms)
        else:
            rotary_kv_write(q, k, v, positions, table, cache, meta.slot_mapping, norms)
            out = paged_attention(q, cache, meta, scale=self.scale, window=self.window, cap=self.cap)
        if scales is not None:
            out = _times(out, scales[1])
        if self.gated or self.head_gates:
            out = sigmoid_gate(out, gate)
        out = out.flatten(1)
        return self.o_proj(out if rows is None else out.index_select(0, rows))

    def _norms(self) -> HeadNorms | None:
        if isinstance(self.q_norm, UnitNorm):
            return HeadNorms(self.q_norm.ones, self.q_norm.ones, self.q_norm.eps, None)
        if not isinstance(self.q_norm, RMSNorm):
            return None
        norm = self.q_norm
        keys = self.k_norm if isinstance(self.k_norm, RMSNorm) else norm
        return HeadNorms(norm.weight, keys.weight, norm.eps, norm.offset, last=self.norms_last)

    def _decode(
        self,
        q,
        k,
        v,
        positions,
        table: RotaryTable,
        cache: KVCache,
        meta: AttentionMetadata,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        return decode_attention(
            q,
            k,
            v,
            positions,
            table,
            cache,
            meta,
            scale=self.scale,
            norms=norms,
            window=self.window,
            cap=self.cap,
        )


def _times(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply heads ``(T, H, D)`` by the factors of their KV heads, in float32, and round to the dtype."""
    return (x * factors.repeat_interleave(x.shape[1] // len(factors))[:, None]).to(x.dtype)
