"""The configuration of a decoder. It imports no torch: processes without torch read configurations too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.layers.experts_config import ExpertsConfig

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding.

    Two types choose their frequencies by the length of a sequence, as Transformers does. ``longrope`` has two
    sets: a sequence longer than ``original_max_position`` uses the long one for all of its tokens. Its keys
    are computed again when it grows beyond that length. ``dynamic`` lowers the frequencies of a longer prompt
    by the prompt's length, and those of each generated token by the token's own position.

    Attributes:
        theta: base of the frequencies.
        type: how frequencies are rescaled, see :func:`engine.layers.rotary.inverse_frequencies`.
        factor: context extension factor (linear, dynamic, yarn, llama3, proportional).
        low_freq_factor, high_freq_factor: llama3's bounds.
        beta_fast, beta_slow: yarn's bounds, in rotations over the original context.
        truncate: yarn's bounds are rounded to whole dimensions.
        original_max_position: context length before extension, in tokens (dynamic, yarn, llama3, longrope).
        short_factor, long_factor: longrope's divisors, one per angle.
        attention_factor: multiplies cos and sin.
        rotary_dim: rotated leading dimensions of a head; None rotates all.
        turning: angles of a head, from the first on, that are not 0 (proportional).
        mrope_section: angles per axis (t, h, w) of M-RoPE, or per axis of four (Hunyuan); None is
            one-dimensional.
        query_growth: ``(b, n)``: queries at position ``p`` are multiplied by ``1 + b log(1 + floor(p / n))``
            (Ministral-3); None leaves them as they are.
        mrope_interleaved: how many axes alternate (Qwen3-VL, Ernie 4.5 VL); 0: they lie in pieces (Qwen2-VL).
        adjacent: neighbouring dimensions rotate against each other (GLM) instead of halves of a head.
        first_position: position of a sequence's first token: PaliGemma counts from 1. Only ``dynamic`` and
            ``longrope`` show it, whose frequencies depend on the length by positions.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    original_max_position: int | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    rotary_dim: int | None = None
    turning: int = 0
    mrope_section: tuple[int, ...] | None = None
    query_growth: tuple[float, int] | None = None
    mrope_interleaved: int = 0
    adjacent: bool = False
    first_position: int = 0

    @property
    def num_axes(self) -> int:
        """Axes of positions."""
        return 1 if self.mrope_section is None else len(self.mrope_section)

    @property
    def depends_on_length(self) -> bool:
        """True if the frequencies of a sequence depend on its length."""
        return self.type in ("dynamic", "longrope")

    def variant(self, num_tokens: int) -> int:
        """The frequencies that the keys of ``num_tokens`` known tokens are computed with.

        Equal tokens have equal keys only under equal variants. 0 stands for those of short sequences, 1 for
        longrope's long ones; otherwise the variant is the length itself, by positions.
        """
        if not self.depends_on_length:
            return 0
        assert self.original_max_position is not None
        length = num_tokens + self.first_position
        if length <= self.original_max_position:
            return 0
        return 1 if self.type == "longrope" else length

    @property
    def recompute_beyond(self) -> int | None:
        """Tokens of the longest sequence that keeps its keys when it grows by one; None if all do."""
        if self.type != "longrope" or self.original_max_position is None:
            return None
        return self.original_max_position - self.first_position


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """A gated delta net, the linear attention of Qwen3.5 (https://arxiv.org/abs/2412.06464).

    Attributes:
        key_heads, value_heads: of the whole model; each key head serves ``value_heads / key_heads``
            consecutive value heads.
        key_dim, value_dim: numbers per key head and per value head.
        conv_width: tokens that the causal convolution before it sees.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    def channels(self, num_ranks: int = 1) -> int:
        """Numbers of queries, keys and values of a token on one rank."""
        return (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) // num_ranks

    def recurrent_shape(self, num_ranks: int = 1) -> tuple[int, int, int]:
        """Shape of a sequence's recurrent state on one rank."""
        return self.value_heads // num_ranks, self.key_dim, self.value_dim

    def splits(self, num_ranks: int) -> bool:
        """Return whether ranks can have equal shares."""
        return self.key_heads % num_ranks == 0 and self.value_heads % num_ranks == 0

    def __str__(self) -> str:
        return f"{self.key_heads} key and {self.value_heads} value heads of linear attention"


@dataclass(frozen=True, slots=True)
class ShortConvConfig:
    """The short convolution that LFM2 has in place of attention: ``out(c * conv(b * u))``, where ``b``, ``c``
    and ``u`` are projections of the input.

    Attributes:
        width: numbers of each of these, which is the hidden size.
        conv_width: tokens that the causal convolution sees.
        bias: whether the convolution and the projections have biases.
    """

    width: int
    conv_width: int
    bias: bool = False

    def channels(self, num_ranks: int = 1) -> int:
        """Numbers of a token that are convolved on one rank."""
        return self.width // num_ranks

    def recurrent_shape(self, num_ranks: int = 1) -> tuple[int, int, int]:
        """Shape of nothing: there is no state beside the convolution's."""
        return 0, 0, 0

    def splits(self, num_ranks: int) -> bool:
        """Return whether ranks can have equal shares."""
        return self.width % num_ranks == 0

    def __str__(self) -> str:
        return f"{self.width} channels of short convolutions"


@dataclass(frozen=True, slots=True)
class LayerInputsConfig:
    """Inputs of each layer of their own, made of a token and its embedding (Gemma 4).

    Attributes:
        width: numbers of a token's input of one layer.
        vocab_size: rows of the table by token.
    """

    width: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer: Llama, Qwen, Mistral, Phi3, Gemma, Granite, or the text part of a VLM.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the whole model, before it is split over ranks.
        activation: of the gated MLP, by its Hugging Face name.
        max_position: longest context the checkpoint was made for, in tokens, after rotary scaling.
        qkv_bias, o_bias, mlp_bias: whether the projections have biases.
        qk_norm: RMSNorm over each head of q and k, before rotation.
        qk_norm_last: it is behind the rotation instead.
        qk_norm_whole: it is over all heads of q together, and over all of k (OLMo).
        qk_layer_norm: in its place are LayerNorms without shift, with weights for each head (Command R+).
        qk_unit_norm: in its place each head of q and k is divided by its root mean square.
        output_gate: each head's attention is multiplied by the sigmoid of a gate; ``q_proj`` makes each
            head's query and behind it its gate.
        gate_apart: a projection of its own makes the gates, ``gate_proj``.
        head_gate: each head's attention is multiplied by the sigmoid of one number, which ``g_proj`` makes.
        recurrence: what the layers ``linear_layers`` have in place of attention; None if all layers have
            attention.
        windows: sliding window per layer in tokens (a query sees keys with ``0 <= q - k < window``), None for
            full attention; an empty tuple means full attention everywhere.
        norm_offset: added to the weights of all norms, which checkpoints of Gemma up to 3 store less one;
            None to round before scaling, see :func:`~engine.kernels.rms_norm.rms_norm`.
        last_norm_offset: the same of the norm behind the last layer, where it differs.
        parallel: attention and MLP of a layer have one input, see
            :class:`~engine.layers.parallel_layer.ParallelLayer`.
        layer_norms: norms are LayerNorms without shift; of such models alone.
        post_norm: norms come after attention and MLP alone, see
            :class:`~engine.layers.post_norm_layer.PostNormLayer`.
        sandwich: norms after attention and MLP as well, before their results are added to the residual.
        out_norm_eps: of these; ``rms_norm_eps`` if None.
        embedding_norm: the token embeddings are divided by their root mean square.
        embedding_multiplier: factor of the token embeddings, rounded to the model's dtype.
        multiplies_rows: the factor is that of embedding rows too.
        residual_multiplier: factor of the results of attention and MLP.
        logits_divisor: divides the logits.
        logits_multiplier: multiplies the logits.
        logits_cap: a logit ``s`` becomes ``cap * tanh(s / cap)``; None leaves logits as they are.
        attention_cap: the same for attention scores.
        attention_scale: factor of the attention scores; ``head_dim ** -0.5`` if None.
        local_rope: rotary embedding of the layers ``local_layers``; None if all have ``rope``.
        local_heads: ``(num_kv_heads, head_dim)`` of these layers; None if all have the same.
        keys_are_values: the other layers have no projection of values: keys before their norm are values,
            too.
        value_norm: values of a head are divided by their root mean square.
        num_borrowing: trailing layers without keys and values of their own. Each uses those of the last layer
            before all of them that is in ``local_layers``, or is not, as itself.
        borrowing_size: intermediate size of their MLPs; None if it is that of all.
        both_ways: the tokens that attend to each other in both directions: those of each unbroken run of
            embedding rows (``images``), all ``seeing_tokens`` of a prompt (``tokens``), or all of a prompt
            (``prompt``); None: every token attends to earlier ones only.
        seeing_tokens: see ``both_ways``.
        local_both_ways: they do so in ``local_layers`` alone.
        further_embeddings: trailing rows of the table of embeddings that the checkpoint holds in a tensor of
            their own.
        unpredicted: trailing tokens of the vocabulary that have embeddings, but no logits.
        row_token: the token whose embedding is added to each embedding row of media; None if none is.
        media_tokens: tokens in whose places embedding rows of media stand; where none does, and in the table
            of ``layer_inputs``, they are looked up as ``blank_token``.
        layer_inputs: what each layer adds of a token beside attention and MLP; None if there is nothing.
        layer_scales: the output of each layer, residual included, is multiplied by a learned number.
        experts: the layers whose MLP is a mixture of experts; None if no layer's is.
        deepstack_layers: layers after which visual features are added, the first ones (Qwen3-VL) or any.
        projected_width: numbers of a vector that a projection with bias makes of each hidden state, for
            models that are trained to retrieve (ColQwen2); None if vectors are hidden states.
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
    qk_norm_last: bool = False
    qk_norm_whole: bool = False
    qk_layer_norm: bool = False
    qk_unit_norm: bool = False
    output_gate: bool = False
    gate_apart: bool = False
    head_gate: bool = False
    recurrence: DeltaNetConfig | ShortConvConfig | None = None
    linear_layers: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    norm_offset: float | None = None
    last_norm_offset: float | None = None
    parallel: bool = False
    layer_norms: bool = False
    post_norm: bool = False
    sandwich: bool = False
    out_norm_eps: float | None = None
    embedding_norm: bool = False
    embedding_multiplier: float = 1.0
    multiplies_rows: bool = False
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_multiplier: float = 1.0
    logits_cap: float | None = None
    attention_cap: float | None = None
    attention_scale: float | None = None
    local_rope: RopeConfig | None = None
    local_layers: tuple[int, ...] = ()
    local_heads: tuple[int, int] | None = None
    keys_are_values: bool = False
    value_norm: bool = False
    num_borrowing: int = 0
    borrowing_size: int | None = None
    both_ways: Literal["images", "tokens", "prompt"] | None = None
    seeing_tokens: tuple[int, ...] = ()
    local_both_ways: bool = False
    further_embeddings: int = 0
    unpredicted: int = 0
    row_token: int | None = None
    media_tokens: tuple[int, ...] = ()
    blank_token: int = 0
    layer_inputs: LayerInputsConfig | None = None
    layer_scales: bool = False
    experts: ExpertsConfig | None = None
    deepstack_layers: tuple[int, ...] = ()
    projected_width: int | None = None

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Ids of tokens that have experts of images and videos in a prompt, of text in an answer."""
        return () if self.experts is None else self.experts.vision_tokens

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """The intermediate sizes of all MLPs, those of experts included, in ascending order."""
        if self.experts is None:
            return tuple(sorted({self.mlp_size(layer) for layer in range(self.num_layers)}))
        of_experts = self.experts.intermediate_size
        sizes = {of_experts, self.experts.shared_size or of_experts, self.experts.vision_size or of_experts}
        if len(self.experts.layers) < self.num_layers or self.experts.beside_mlp:
            sizes |= {self.mlp_size(layer) for layer in range(self.num_layers)}
        return tuple(sorted(sizes))

    def mlp_size(self, layer: int) -> int:
        """Intermediate size of the MLP of ``layer``."""
        wide = layer in self.borrowing_layers and self.borrowing_size
        return wide or self.intermediate_size

    def heads_of(self, layer: int) -> tuple[int, int]:
        """KV heads of ``layer``, of the whole model, and numbers per head."""
        own = self.local_heads if layer in self.local_layers else None
        return own or (self.num_kv_heads, self.head_dim)

    def kv_width(self, layer: int, num_ranks: int) -> int:
        """Numbers of a token's keys in ``layer`` on one of ``num_ranks`` ranks; as many of its values."""
        heads, head_dim = self.heads_of(layer)
        return max(1, heads // num_ranks) * head_dim

    @property
    def borrowing_layers(self) -> range:
        """The layers without keys and values of their own."""
        return range(self.num_layers - self.num_borrowing, self.num_layers)

    def keys_of(self, layer: int) -> int:
        """The layer whose keys and values ``layer`` uses, which is itself for most."""
        first = self.num_layers - self.num_borrowing
        if layer < first:
            return layer
        return max(
            each for each in range(first) if (each in self.local_layers) == (layer in self.local_layers)
        )

    def window(self, layer: int) -> int | None:
        """Sliding window of ``layer`` in tokens; None for full attention."""
        return self.windows[layer] if self.windows else None
