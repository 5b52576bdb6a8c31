"""The decoder of all language models and of the text part of all VLMs: one class, with switches."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.recurrent_state import StateCache
from engine.kernels.rms_norm import Addend, sum_with
from engine.kernels.split_sums import SplitSums, Unfinished, whole
from engine.layers.attention import Attention
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.decoder_config import DecoderConfig, DeltaNetConfig, ShortConvConfig
from engine.layers.delta_net import GatedDeltaNet
from engine.layers.embedding import LMHead, VocabEmbedding
from engine.layers.experts import ExpertsMLP
from engine.layers.layer_inputs import LayerInput, LayerInputs
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm, UnitNorm
from engine.layers.parallel_experts import ParallelExperts
from engine.layers.parallel_layer import ParallelLayer
from engine.layers.post_norm_layer import PostNormLayer
from engine.layers.rotary import Rotary
from engine.layers.short_conv import ShortConv
from engine.layers.split_experts import Modalities, SplitExperts


class DecoderLayer(nn.Module):
    """Attention, a gated delta net or a short convolution, then a gated MLP or a mixture of experts.

    Each comes after a norm, and before another one if the model has such. Some models add the layer's own
    input of each token behind both, and multiply the sum by a number.

    The residual is passed beside the hidden states, so that each addition can be fused with the norm behind
    it, and the norm with the GEMM behind that where it is faster.
    """

    def __init__(self, config: DecoderConfig, layer: int, rotary: Rotary, build: BuildContext) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, build, offset=config.norm_offset)
        self.input_layernorm = norm()
        kind = config.recurrence if layer in config.linear_layers else None
        self.self_attn = Attention(config, layer, rotary, build.at("self_attn")) if kind is None else None
        delta = isinstance(kind, DeltaNetConfig)
        self.linear_attn = GatedDeltaNet(config, build.at("linear_attn")) if delta else None
        short = isinstance(kind, ShortConvConfig)
        self.short_conv = ShortConv(config, build.at("short_conv")) if short else None
        self.post_attention_layernorm = norm()
        eps = config.out_norm_eps or config.rms_norm_eps
        behind = partial(RMSNorm, config.hidden_size, eps, build, offset=config.norm_offset)
        self.attention_out_norm = behind() if config.sandwich else None
        self.mlp_out_norm = behind() if config.sandwich else None
        self.multiplier = config.residual_multiplier
        self.mlp = _make_mlp(config, layer, build.at("mlp"))
        inputs = config.layer_inputs
        self.layer_input = None if inputs is None else LayerInput(config, inputs, build.at("layer_input"))
        self.layer_scale = build.parameter(1) if config.layer_scales else None
        if isinstance(self.mlp, GatedMLP):
            self.mlp.down_proj.before_norm = True
            if self.self_attn is not None:
                self.self_attn.o_proj.before_norm = True

    def forward(
        self,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: KVCache | StateCache,
        meta: AttentionMetadata,
        rows: torch.Tensor | None,
        given: torch.Tensor | None,
        modalities: Modalities | None = None,
    ) -> tuple[torch.Tensor | Unfinished, torch.Tensor | None]:
        """Run the layer for the tokens of a batch; arguments as of :meth:`Decoder.forward`.

        Args:
            x: ``(T, hidden_size)``, what is added to ``residual`` before the first norm.
            given: ``(T, width)``, this layer's inputs; None if there are none.
            modalities: of the tokens that the MLP gets; None if all are text, or have the same experts.

        Returns:
            Hidden states and their residual, for the next layer or the final norm; a residual of None where
            the sum is made already.
        """
        mixer = self.self_attn or self.linear_attn or self.short_conv
        assert mixer is not None
        mixed, residual = mixer(self.input_layernorm, x, residual, positions, cache, meta, rows)
        added, norm = self._added(mixed, self.attention_out_norm), self.post_attention_layernorm
        inner: torch.Tensor | SplitSums
        if modalities is not None and isinstance(self.mlp, SplitExperts):
            inner, residual = self.mlp.of_modalities(norm, added, residual, modalities)
        else:
            inner, residual = self.mlp.after_norm(norm, added, residual)
        x = self._added(inner, self.mlp_out_norm)
        if self.layer_input is None and self.layer_scale is None:
            return x, residual
        if self.layer_input is None or given is None:
            return sum_with(x, residual, self.layer_scale), None
        total = sum_with(x, residual)
        own = self.layer_input(total, given if rows is None else given.index_select(0, rows))
        return sum_with(own, total, self.layer_scale), None

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [] if self.layer_scale is None else [plain_slot(prefix + "layer_scale", self.layer_scale)]

    def _added(self, x: torch.Tensor | SplitSums, norm: RMSNorm | None) -> torch.Tensor | Unfinished:
        """Make of a result ``x`` of attention or MLP what is added to the residual."""
        if norm is not None:
            return norm.of(x, self.multiplier)
        return x if self.multiplier == 1 else Addend(x, None, 0.0, multiplier=self.multiplier)


def _make_mlp(config: DecoderConfig, layer: int, build: BuildContext) -> GatedMLP | ExpertsMLP:
    hidden, act = config.hidden_size, config.activation
    if config.experts is not None and layer in config.experts.layers:
        if config.experts.beside_mlp:
            size = config.mlp_size(layer)
            return ParallelExperts(hidden, config.experts, size, act, config.rms_norm_eps, build)
        if config.experts.vision_size is not None:
            return SplitExperts(hidden, config.experts, act, build)
        return ExpertsMLP(hidden, config.experts, act, build)
    return GatedMLP(hidden, config.mlp_size(layer), act, build, bias=config.mlp_bias)


class Decoder(nn.Module):
    """A decoder-only transformer without state: each call gets the caches and the batch.

    Args:
        max_model_len: longest sequence in tokens; sizes the rotary tables. None takes the checkpoint's limit.
    """

    def __init__(
        self, config: DecoderConfig, build: BuildContext, *, max_model_len: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = build.dtype, build.device
        heads = max(config.heads_of(layer)[0] for layer in range(config.num_layers))
        self.num_kv_heads = max(1, heads // build.tp.size)
        length = max_model_len or config.max_position
        self.rotary = Rotary(config.rope, config.head_dim, length, build)
        local_dim = config.head_dim if config.local_heads is None else config.local_heads[1]
        local = config.local_rope and Rotary(config.local_rope, local_dim, length, build)
        rotaries = [
            local if local and index in config.local_layers else self.rotary
            for index in range(config.num_layers)
        ]
        # As Transformers rounds it.
        self._multiplier = float(torch.tensor(config.embedding_multiplier, dtype=build.dtype))
        self.embed_tokens = VocabEmbedding(
            config.vocab_size, config.hidden_size, build, apart=config.further_embeddings
        )
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = UnitNorm(width, eps, build) if config.embedding_norm else None
        self.row_token: torch.Tensor | None
        token = None if config.row_token is None else torch.tensor([config.row_token], device=build.device)
        self.register_buffer("row_token", token, persistent=False)
        inputs = config.layer_inputs
        self.layer_inputs = None if inputs is None else LayerInputs(config, inputs, build.at("layer_inputs"))
        make = ParallelLayer if config.parallel else PostNormLayer if config.post_norm else DecoderLayer
        self.layers = nn.ModuleList(
            make(config, index, rotary, build.at(f"layers.{index}")) for index, rotary in enumerate(rotaries)
        )
        last = config.norm_offset if config.last_norm_offset is None else config.last_norm_offset
        self.norm = (
            LayerNorm(width, eps, build, shift=False)
            if config.layer_norms
            else RMSNorm(width, eps, build, offset=last)
        )
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(
            config.vocab_size, config.hidden_size, build, tied=tied, unpredicted=config.unpredicted
        )
        projected = config.projected_width
        self.projection = None if projected is None else Linear(width, projected, build)

    def active_layer_parameters(self) -> int:
        """Count the parameters of the first layer on this rank that one token uses."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer | ParallelLayer | PostNormLayer)
        count = sum(parameter.numel() for parameter in layer.parameters())
        if isinstance(layer.mlp, ExpertsMLP | ParallelExperts):
            count -= layer.mlp.idle_parameters()
        return count

    def rehearse_modalities(self, counts: Iterable[int]) -> None:
        """Run the experts by modality of a layer for ``counts`` of tokens, which captured passes do not."""
        split = (layer.mlp for layer in self.layers if isinstance(layer, DecoderLayer))
        found = next((mlp for mlp in split if isinstance(mlp, SplitExperts)), None)
        if found is not None:
            found.rehearse(counts)

    def kv_scales(self) -> list[tuple[float, float]]:
        """The factors of each layer's keys and values in fp8; 1 where the checkpoint has no scales."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer | ParallelLayer | PostNormLayer)
            found.append((1.0, 1.0) if layer.self_attn is None else layer.self_attn.kv_scales())
        return found

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids ``(T,)`` to embeddings ``(T, hidden_size)``."""
        embeds = self.embed_tokens(self._named(ids))
        if self.embedding_norm is not None:
            embeds = self.embedding_norm(embeds)
        return embeds if self._multiplier == 1 else embeds * self._multiplier

    def _named(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` with the blank token in place of those that stand for rows of media."""
        for token in self.config.media_tokens:
            ids = torch.where(ids == token, self.config.blank_token, ids)
        return ids

    def scaled_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Map embedding rows ``(R, hidden_size)`` of media to what stands among the tokens' embeddings."""
        if self.row_token is not None:
            rows = rows + self.embed_tokens(self.row_token)
        whole = self._multiplier == 1 or not self.config.multiplies_rows
        return rows if whole else rows * self._multiplier

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KVCache | StateCache],
        meta: AttentionMetadata,
        deepstack: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        modalities: tuple[Modalities, Modalities] | None = None,
    ) -> torch.Tensor:
        """Run the new tokens of a batch and write their keys and values.

        Most tokens of a prompt are computed for their keys and values only. With ``rows`` the last layer
        drops the others after its attention.

        Args:
            embeds: ``(T, hidden_size)``.
            positions: rows of the rotary tables, int64 ``(T,)``, or ``(axes, T)`` with M-RoPE; see
                :class:`~engine.layers.rotary.Rotary`.
            caches: one per layer: keys and values, or recurrent states.
            meta: the batch's sequences and their KV blocks.
            deepstack: ``(n, T, hidden_size)`` added to the hidden states after each of the ``n`` layers
                :attr:`DecoderConfig.deepstack_layers`; zero at text positions.
            rows: int64 ``(R,)``, the tokens whose hidden states are returned; None for all.
            ids: int64 ``(T,)``, the tokens, which models with inputs of each layer need.
            modalities: of all tokens and of ``rows``, for models with experts of images and videos; None if
                all tokens are text.

        Returns:
            Hidden states after the final norm, ``(T, hidden_size)``, or ``(R, hidden_size)`` for ``rows``.
        """
        x: torch.Tensor | Unfinished = embeds
        residual = None
        last, metas = len(self.layers) - 1, meta.by_group()
        causal = metas
        if self.config.local_both_ways and meta.key_ends is not None:
            causal = replace(meta, key_ends=None, gaps=False).by_group()
        given = None
        if self.layer_inputs is not None:
            assert ids is not None
            given = self.layer_inputs(self._named(ids), embeds)
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            wanted = rows if index == last else None
            own = (metas if index in self.config.local_layers else causal)[cache.group]
            inputs = None if given is None else given[:, index]
            of_tokens = {} if modalities is None else {"modalities": modalities[wanted is not None]}
            x, residual = layer(x, residual, positions, cache, own, wanted, inputs, **of_tokens)
            if deepstack is not None and index in self.config.deepstack_layers:
                added = deepstack[self.config.deepstack_layers.index(index)]
                x = whole(x) + (added if wanted is None else added.index_select(0, wanted))
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states ``(N, hidden_size)`` to logits ``(N, vocab_size)`` in the model's dtype."""
        logits, cap = self.lm_head(hidden), self.config.logits_cap
        if self.config.logits_divisor != 1:
            logits = logits / self.config.logits_divisor
        if self.config.logits_multiplier != 1:
            logits = logits * self.config.logits_multiplier
        return logits if cap is None else (logits / cap).tanh() * cap

    def logit_gap(self, hidden: torch.Tensor, first: int, second: int) -> torch.Tensor:
        """Map hidden states ``(N, hidden_size)`` to the logit of token ``first`` minus that of ``second``.

        Returns float32 ``(N, 1)``.
        """
        if self.config.logits_cap is not None:
            logits = self.logits(hidden).float()
            return logits[:, first : first + 1] - logits[:, second : second + 1]
        factor = self.config.logits_multiplier / self.config.logits_divisor
        return self.lm_head.gap(hidden, first, second) * factor

    def vectors(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states ``(N, hidden_size)`` to vectors ``(N, width)`` of any length."""
        return hidden if self.projection is None else self.projection(hidden)
