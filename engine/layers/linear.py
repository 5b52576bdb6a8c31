"""Linear layers. Each defines its fusion, its sharding and the checkpoint tensors that fill its shard."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import ConfigError
from engine.kernels.dispatch import (
    activated_linear,
    activated_rounded,
    fuses_norm,
    gated_rounded,
    linear,
    norm_gated_rounded,
    norm_linear,
    split_linear,
    sum_linear,
    takes_rounded,
)
from engine.kernels.fp8 import RoundedRows, Scale
from engine.kernels.int4 import Int4Scale
from engine.kernels.skinny_gemm import split_counters
from engine.kernels.split_sums import SplitSums, Unfinished
from engine.layers.build import BuildContext, Target, WeightSlot, plain_slot, whole
from engine.layers.matrix_formats import Fp8Format, PackedFormat
from engine.layers.norm import LayerNorm, RMSNorm
from engine.layers.packed import PackedMatrix, packed_matrix
from engine.layers.quantised import check_share, make_matrix, matrix_target, scale_slot


class _Projection(nn.Module):
    """A linear layer whose outputs on this rank come from this rank's matrix alone."""

    weight: torch.Tensor
    scale: Scale | Int4Scale | None
    bias: torch.Tensor | None

    def takes_rounded(self, x: torch.Tensor) -> bool:
        """Return whether rows in fp8 are taken instead of ``x``."""
        return takes_rounded(x, self.weight, self.scale)

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        if self.scale is not None:
            return linear(x, self.weight, self.bias, scale=self.scale)
        assert isinstance(x, torch.Tensor)
        return F.linear(x, self.weight, self.bias)


class Linear(_Projection):
    """Computes ``x @ weight.T + bias``, the same on every rank. Weight ``(out_features, in_features)``.

    Args:
        stored: the format of the weight; None for the model's dtype.
    """

    scale: Scale | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        build: BuildContext,
        *,
        bias: bool = True,
        stored: Fp8Format | None = None,
    ) -> None:
        super().__init__()
        self.format = stored
        self.weight, self.scale = make_matrix(self, out_features, in_features, build, stored)
        self.bias = build.parameter(out_features) if bias else None
        self.dtype = build.dtype

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Compute ``activation(x @ weight.T + bias)``, fused where that is faster.

        Args:
            activation: a key of :data:`~engine.kernels.activation.ACTIVATIONS`.
        """
        return activated_linear(x, self.weight, self.bias, activation, self.scale)

    def activated_rounded(self, x: RoundedRows, activation: str) -> RoundedRows:
        """Compute :meth:`activated` of rows in fp8, with its own rows rounded to fp8."""
        assert self.scale is not None
        return activated_rounded(x, self.weight, self.bias, activation, self.scale)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        target = matrix_target(self.weight, self.scale, self.format, self.dtype)
        shape = tuple(self.weight.shape)
        # A convolution whose stride is its kernel size is this layer, with its kernel flattened.
        slots = [WeightSlot(prefix + "weight", shape, [(whole(shape), target)], reshape=True)]
        if self.bias is not None:
            slots.append(plain_slot(prefix + "bias", self.bias))
        return slots


@dataclass(frozen=True, slots=True)
class FusedPart:
    """One of the projections in a fused layer.

    Attributes:
        name: the projection's name in unfused checkpoints, e.g. ``q_proj``.
        total: output features in the whole model.
        start, size: this rank's range of the output features.
        padding: further output features, of zeros.
    """

    name: str
    total: int
    start: int
    size: int
    padding: int = 0

    @property
    def rows(self) -> int:
        """The part's rows of the layer's matrix."""
        return self.size + self.padding


def unread_words(layer: nn.Module, build: BuildContext) -> torch.Tensor:
    """Reserve the layer's ``weight`` for the words of numbers of 4 bits."""
    words = torch.empty((0, 0), dtype=torch.int16, device=build.device)
    layer.register_buffer("weight", words, persistent=False)
    return words


class FusedColumnLinear(_Projection):
    """Several projections of one input, computed by one GEMM; output features are split over ranks.

    Returns ``(..., sum of part sizes on this rank)``, parts in order.

    Args:
        parts: the projections. A checkpoint holds each as a tensor, or all concatenated in this order.
        fused_name: the layer's own name, which is that of the concatenated tensor. The tensors of single
            parts are its siblings.
        backwards_name: the sibling that is the concatenation in the reverse order; None if there is none.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[FusedPart],
        build: BuildContext,
        *,
        fused_name: str,
        backwards_name: str | None = None,
        bias: bool,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.backwards_name = backwards_name
        self.fused_name = fused_name
        self.in_features = in_features
        rows = sum(part.rows for part in parts)
        self.format = build.format_of([part.name for part in parts], fused_name)
        self.scale: Scale | Int4Scale | None
        self.packed: PackedMatrix | None = None
        if isinstance(self.format, PackedFormat):
            name = build.path + fused_name
            self.packed = packed_matrix(name, self.format, in_features, 0, in_features, build)
            self.weight, self.scale = unread_words(self, build), None
        else:
            self.weight, self.scale = make_matrix(self, rows, in_features, build, self.format)
        self.bias = build.parameter(rows) if bias else None
        self.dtype = build.dtype
        self._clear_padding()

    def _clear_padding(self) -> None:
        """Zero what no tensor of a checkpoint fills."""
        end = 0
        for part in self.parts:
            end += part.rows
            for tensor in (self.weight, self.bias, getattr(self, "weight_scale", None)):
                if part.padding and tensor is not None:
                    tensor.data[end - part.padding : end].zero_()

    def after_norm(
        self,
        norm: RMSNorm | LayerNorm | None,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        *,
        activation: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project ``norm(x + residual)``; fused where that is faster.

        Args:
            norm: None for none; a layer norm has no shift.
            x, residual: ``(T, in_features)``; ``residual`` is None before the first block.
            activation: if given, the two parts are a gate and its factor, and the result is
                ``activation(gate) * factor``; see :func:`~engine.kernels.dispatch.norm_linear`.

        Returns:
            The projections ``(T, out)`` and ``x + residual``.
        """
        scale, eps, kind = _of_norm(norm)
        return norm_linear(
            x,
            residual,
            scale,
            eps,
            self.weight,
            self.bias,
            activation=activation,
            scale=self.scale,
            **kind,
        )

    def fuses_norm(self, x: torch.Tensor | Unfinished) -> bool:
        """Return whether :meth:`after_norm` computes the norm itself, so that two layers each compute it."""
        return fuses_norm(x, self.weight, self.scale)

    def normed(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """Project what a norm gives: :meth:`after_norm` without the norm."""
        return linear(x, self.weight, self.bias, activation=activation, scale=self.scale)

    def gated_rounded(self, x: RoundedRows, activation: str) -> RoundedRows:
        """Compute ``activation(gate) * factor`` of the two parts for rows in fp8, and round its rows."""
        assert isinstance(self.scale, Scale)
        return gated_rounded(x, self.weight, self.bias, activation, self.scale)

    def rounded_after_norm(
        self,
        norm: RMSNorm | LayerNorm | None,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        *,
        activation: str,
    ) -> tuple[RoundedRows, torch.Tensor]:
        """Compute :meth:`after_norm` with rows rounded to fp8."""
        scale, eps, kind = _of_norm(norm)
        return norm_gated_rounded(
            x,
            residual,
            scale,
            eps,
            self.weight,
            self.bias,
            activation=activation,
            scale=self.scale,
            **kind,
        )

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        parent = prefix.removesuffix(self.fused_name + ".")
        whole_name = parent + self.fused_name
        fused = any(f"{whole_name}.{kind}" in names for kind in ("weight", "qweight", "weight_packed"))
        if self.packed is not None:
            slots = self._packed_slots(parent, self.packed, fused)
        else:
            assert not isinstance(self.format, PackedFormat) and not isinstance(self.scale, Int4Scale)
            target = matrix_target(self.weight, self.scale, self.format, self.dtype)
            if self.backwards_name is not None and f"{parent}{self.backwards_name}.weight" in names:
                if self.bias is not None or (self.format is not None and self.format.scale is not None):
                    raise ConfigError(f"{parent}{self.backwards_name} is not supported with scales or a bias")
                return [self._backwards_slot(parent + self.backwards_name, target)]
            slots = self._slots(parent, "weight", target, (self.in_features,), fused)
            if self.format is not None and self.scale is not None and self.format.scale is not None:
                slots += self._scale_slots(parent, self.format, self.scale.values, fused)
        if self.bias is not None:
            slots += self._slots(parent, "bias", self.bias.data, (), fused)
        return slots

    def finish_loading(self) -> None:
        """Put a weight in 4 bits, which was read, into the order of the kernels."""
        if self.packed is not None:
            self.weight, scale = self.packed.finish()
            self.scale = scale.paired()

    def _backwards_slot(self, name: str, target: Target) -> WeightSlot:
        """The slot of a matrix ``name`` of all parts, the last one first."""
        slot = WeightSlot(f"{name}.weight", (sum(part.total for part in self.parts), self.in_features))
        row, end = 0, slot.shape[0]
        for part in self.parts:
            begin = end - part.total + part.start
            region = slice(begin, begin + part.size), slice(0, self.in_features)
            slot.copies.append((region, target[row : row + part.size]))
            row += part.rows
            end -= part.total
        return slot

    def _packed_slots(self, parent: str, matrix: PackedMatrix, fused: bool) -> list[WeightSlot]:
        if not fused:
            return [
                slot
                for part in self.parts
                for slot in matrix.slots(f"{parent}{part.name}.", part.total, [(part.start, part.size)])
            ]
        ranges, offset = [], 0
        for part in self.parts:
            ranges.append((offset + part.start, part.size))
            offset += part.total
        return matrix.slots(f"{parent}{self.fused_name}.", offset, ranges)

    def _scale_slots(
        self, parent: str, stored: Fp8Format, scales: torch.Tensor, fused: bool
    ) -> list[WeightSlot]:
        slots, together, row, offset = [], [], 0, 0
        for part in self.parts:
            own = scales[row : row + part.size]
            name = f"{parent}{part.name}.{stored.scale}"
            slots.append(scale_slot(name, stored, (part.total, self.in_features), [(part.start, own)]))
            together.append((offset + part.start, own))
            row += part.rows
            offset += part.total
        if not fused:
            return slots
        return [
            scale_slot(
                f"{parent}{self.fused_name}.{stored.scale}", stored, (offset, self.in_features), together
            )
        ]

    def _slots(
        self, parent: str, kind: str, target: Target, tail: tuple[int, ...], fused: bool
    ) -> list[WeightSlot]:
        total = sum(part.total for part in self.parts)
        together = WeightSlot(f"{parent}{self.fused_name}.{kind}", (total, *tail))
        apart = []
        row = offset = 0
        columns = tuple(slice(0, size) for size in tail)
        for part in self.parts:
            view = target[row : row + part.size]
            own = slice(part.start, part.start + part.size)
            apart.append(
                WeightSlot(f"{parent}{part.name}.{kind}", (part.total, *tail), [((own, *columns), view)])
            )
            shifted = slice(offset + part.start, offset + part.start + part.size)
            together.copies.append(((shifted, *columns), view))
            row += part.rows
            offset += part.total
        return [together] if fused else apart


def _of_norm(norm: RMSNorm | LayerNorm | None) -> tuple[torch.Tensor | None, float, dict[str, Any]]:
    """The scale of a norm, its epsilon, and options of :func:`~engine.kernels.dispatch.norm_linear`."""
    if norm is None:
        return None, 0.0, {}
    if isinstance(norm, LayerNorm):
        assert norm.bias is None
        return norm.weight, norm.eps, {"centred": True}
    return norm.weight, norm.eps, {"offset": norm.offset}


def gate_up_linear(
    hidden: int, intermediate: int, build: BuildContext, *, bias: bool, padding: int = 0
) -> FusedColumnLinear:
    """Make the gate and up projections of a gated MLP; each rank has the same output features of both.

    Args:
        padding: output features of zeros behind the rank's of each.
    """
    size = build.share(intermediate, "intermediate size")
    start = build.tp.rank * size
    parts = [FusedPart(name, intermediate, start, size, padding) for name in ("gate_proj", "up_proj")]
    return FusedColumnLinear(
        hidden, parts, build, fused_name="gate_up_proj", backwards_name="up_gate_proj", bias=bias
    )


def join_weights(layers: Sequence[FusedColumnLinear]) -> torch.Tensor | None:
    """Move the weights of layers of one input into one matrix, whose parts they are from now on.

    Returns:
        The matrix, ``(sum of outputs, in_features)``; None, and nothing is moved, if a weight is quantised or
        a layer has a bias.
    """
    if any(layer.format is not None or layer.bias is not None for layer in layers):
        return None
    whole = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
    return whole


def qkv_linear(
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    build: BuildContext,
    *,
    bias: bool,
    fused_name: str = "qkv_proj",
    gated: bool = False,
    gate_apart: bool = False,
    head_gate: bool = False,
    names: Sequence[str] = ("k_proj", "v_proj"),
) -> FusedColumnLinear:
    """Make the query, key and value projections.

    Ranks split the heads. With fewer KV heads than ranks, several ranks have the same KV head.

    Args:
        gated: each query is followed by a gate of its head, of ``head_dim`` too.
        gate_apart: these gates are a projection of their own, ``gate_proj``, which comes last.
        head_gate: behind all others, ``g_proj`` makes one number for each query head.
        names: the projections to KV heads.
    """
    heads = build.share(num_heads, "attention heads")
    rank, size = build.tp.rank, build.tp.size
    if num_kv_heads >= size:
        kv_heads = build.share(num_kv_heads, "KV heads")
        kv_start = rank * kv_heads
    else:
        kv_heads = 1
        kv_start = rank // (size // num_kv_heads)
    query_dim = 2 * head_dim if gated and not gate_apart else head_dim
    queries = FusedPart("q_proj", num_heads * query_dim, rank * heads * query_dim, heads * query_dim)
    others = [
        FusedPart(name, num_kv_heads * head_dim, kv_start * head_dim, kv_heads * head_dim) for name in names
    ]
    if gated and gate_apart:
        others.append(replace(queries, name="gate_proj"))
    if head_gate:
        # Kernels read rows by 16 bytes.
        others.append(FusedPart("g_proj", num_heads, rank * heads, heads, -heads % 16))
    return FusedColumnLinear(hidden, [queries, *others], build, fused_name=fused_name, bias=bias)


class RowLinear(nn.Module):
    """A linear layer whose input features are split over ranks; the outputs of all ranks are added up.

    Args:
        padding: input features behind the rank's that count nothing; of matrices that are rounded as they are
            read.

    Attributes:
        before_norm: a norm follows that adds a residual, and takes
            :class:`~engine.kernels.split_sums.SplitSums`, too.
    """

    def __init__(
        self, in_features: int, out_features: int, build: BuildContext, *, bias: bool, padding: int = 0
    ) -> None:
        super().__init__()
        self.tp = build.tp
        self.in_total = in_features
        self.in_features = build.share(in_features, "input features")
        self.dtype = build.dtype
        self.out_features = out_features
        self.before_norm = False
        self.format = build.format_of()
        self.scale: Scale | Int4Scale | None
        self.packed: PackedMatrix | None = None
        first = self.in_features * self.tp.rank
        if isinstance(self.format, PackedFormat):
            self.packed = packed_matrix(build.path, self.format, in_features, first, self.in_features, build)
            self.weight, self.scale = unread_words(self, build), None
        else:
            if self.format is not None:
                check_share(self.in_features, first, in_features, self.format)
            inputs = self.in_features + padding
            self.weight, self.scale = make_matrix(self, out_features, inputs, build, self.format)
        self.bias = build.parameter(out_features) if bias else None
        self.counters: torch.Tensor
        self.register_buffer("counters", split_counters(out_features, build.device), persistent=False)

    def takes_rounded(self, x: torch.Tensor | Unfinished) -> bool:
        """Return whether rows in fp8 are taken instead of rows in the dtype of ``x``, as many of them."""
        return takes_rounded(x, self.weight, self.scale)

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor | SplitSums:
        if self.tp.size == 1:
            run = split_linear if self.before_norm else linear
            return run(x, self.weight, self.bias, counters=self.counters, scale=self.scale)
        out = self._sum(x)
        return out if self.bias is None else out + self.bias

    def _sum(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        """Compute the sum of all ranks' shares, without the bias."""
        if self.tp.peers is not None:
            out = sum_linear(x, self.weight, self.tp.peers, scale=self.scale)
            if out is not None:
                return out
        return self.tp.all_reduce(self.partial(x))

    def partial(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        """Compute this rank's share of the sum, without the bias."""
        if isinstance(x, torch.Tensor) and self.packed is not None and self.packed.gathers:
            # The rank's groups of inputs have their inputs on all ranks.
            x = self.tp.all_gather(x)
        return linear(x, self.weight, counters=self.counters, scale=self.scale)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        rows, columns = self.out_features, self.in_features
        if self.packed is not None:
            slots = self.packed.slots(prefix, rows, [(0, rows)])
        else:
            assert not isinstance(self.format, PackedFormat) and not isinstance(self.scale, Int4Scale)
            start = self.tp.rank * columns
            region = (slice(0, rows), slice(start, start + columns))
            target = matrix_target(self.weight, self.scale, self.format, self.dtype)
            slots = [WeightSlot(prefix + "weight", (rows, self.in_total), [(region, target)])]
            if self.format is not None and self.scale is not None and self.format.scale is not None:
                name, shards = prefix + self.format.scale, [(0, self.scale.values)]
                slots.append(scale_slot(name, self.format, (rows, self.in_total), shards, first_input=start))
        if self.bias is not None:
            slots.append(plain_slot(prefix + "bias", self.bias))
        return slots

    def finish_loading(self) -> None:
        """Put a weight in 4 bits, which was read, into the order of the kernels."""
        if self.packed is not None:
            self.weight, scale = self.packed.finish()
            self.scale = scale.paired()
