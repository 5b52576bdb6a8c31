"""The MLPs of a mixture of experts: arguments and torch reference.

Every token has ``top_k`` experts, so ``T`` tokens make ``P = T * top_k`` pairs of a token and an expert. Pair
``p`` is that of token ``p // top_k``. Shapes depend on ``T`` alone, never on the choice of experts, and the
kernels read nothing on the host: they may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from engine.kernels.act_mul import act_mul_reference
from engine.kernels.fp8 import Scale, dequantise_reference
from engine.kernels.int4 import Int4Scale, dequantise_int4_reference


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One matrix ``(N, K)`` for each of ``E`` experts.

    Attributes:
        weight: ``(E, N, K)`` contiguous; with ``scale`` fp8, or the words of int4, ``(E, N, W)``.
        scale: what fp8 weights are multiplied by, or the scales of int4, with values ``(E * N, G)``: those
            of all experts, one expert after the other.
    """

    weight: torch.Tensor
    scale: Scale | Int4Scale | None = None

    @property
    def inputs(self) -> int:
        return self.scale.inputs if isinstance(self.scale, Int4Scale) else self.weight.shape[2]

    def one(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix of one expert, dequantised to ``dtype``."""
        if self.scale is None:
            return self.weight[expert]
        values = self.scale.values.unflatten(0, self.weight.shape[:2])[expert]
        if isinstance(self.scale, Int4Scale):
            zeros = self.scale.zeros
            zeros = None if zeros is None else zeros.unflatten(0, self.weight.shape[:2])[expert]
            factors = self.scale.factors
            factors = None if factors is None else factors.unflatten(0, self.weight.shape[:2])[expert]
            own = replace(self.scale, values=values, zeros=zeros, order=None, factors=factors)
            return dequantise_int4_reference(self.weight[expert], own, dtype)
        return dequantise_reference(self.weight[expert], Scale(values, self.scale.group), dtype)


def experts_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    activation: str,
) -> torch.Tensor:
    """Compute :func:`~engine.kernels.dispatch.experts` in torch, one expert after the other.

    Each operation rounds its result, as in Transformers. It reads the counts of tokens on the host: it can't
    be captured in a CUDA graph.
    """
    top_k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=len(gate_up.weight)).tolist()
    out = torch.zeros_like(x)
    start = 0
    for expert, count in enumerate(counts):
        pairs = order[start : start + count]
        start += count
        if not count:
            continue
        tokens = pairs // top_k
        inner = act_mul_reference(F.linear(x[tokens], gate_up.one(expert, x.dtype)), activation)
        result = F.linear(inner, down.one(expert, x.dtype)) * weights.flatten()[pairs, None]
        out.index_add_(0, tokens, result.to(x.dtype))
    return out
