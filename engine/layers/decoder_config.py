"""The switches of the one decoder. No torch here: configurations travel to processes that never load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding.

    Attributes:
        theta: base of the frequencies.
        type: how frequencies are rescaled. ``linear`` and ``llama3`` use ``factor``; ``longrope`` divides by
            ``short_factor`` or ``long_factor`` (see :func:`engine.layers.rotary.inverse_frequencies`).
        factor: context extension factor.
        low_freq_factor, high_freq_factor: llama3's bounds.
        original_max_position: context length before extension, in tokens (llama3, longrope).
        attention_factor: multiplies cos and sin; None derives longrope's.
        rotary_dim: rotated leading dimensions of a head; None rotates all.
        mrope_section: angles per axis (t, h, w) of M-RoPE; None is one-dimensional.
        mrope_interleaved: axes alternate (Qwen3-VL) instead of lying in three pieces (Qwen2-VL).
    """

    theta: float = 10000.0
    type: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    rotary_dim: int | None = None
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One decoder-only transformer: Llama, Qwen2, Qwen3, Mistral, Phi3 and the language half of VLMs.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the whole model, before tensor parallelism.
        activation: of the gated MLP, ``silu`` or ``gelu_tanh``.
        max_position: longest context the checkpoint was made for, in tokens.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm over each head of q and k, before rotation.
        windows: sliding window per layer in tokens (a query sees keys with ``0 <= q - k < window``), None for
            full attention; an empty tuple means full attention everywhere.
        num_deepstack: leading layers after which visual features are added (Qwen3-VL).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    num_deepstack: int = 0

    def window(self, layer: int) -> int | None:
        """Sliding window of ``layer`` in tokens; None sees everything."""
        return self.windows[layer] if self.windows else None
