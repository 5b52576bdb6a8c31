"""Inputs of each decoder layer of their own, made of a token and its embedding (Gemma 4)."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.decoder_config import DecoderConfig, LayerInputsConfig
from engine.layers.embedding import VocabEmbedding
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm


class LayerInputs(nn.Module):
    """Computes ``(norm(projection(embeds) / sqrt(hidden)) + embedding(ids) * sqrt(width)) / sqrt(2)``, once
    for all layers."""

    def __init__(self, decoder: DecoderConfig, config: LayerInputsConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        numbers = decoder.num_layers * config.width
        self.embedding = VocabEmbedding(config.vocab_size, numbers, build)
        self.projection = Linear(decoder.hidden_size, numbers, build.at("projection"), bias=False)
        self.norm = RMSNorm(config.width, decoder.rms_norm_eps, build, offset=decoder.norm_offset)
        self._scale = decoder.hidden_size**-0.5
        # As Transformers rounds it.
        self._multiplier = float(torch.tensor(config.width**0.5, dtype=build.dtype))

    def forward(self, ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(T,)`` and what stands in their places, ``(T, hidden)``, to ``(T, layers, width)``."""
        of_tokens = self.embedding(ids) * self._multiplier
        projected = (self.projection(embeds) * self._scale).unflatten(-1, (-1, self.config.width))
        return (self.norm(projected) + of_tokens.view_as(projected)) * 2**-0.5


class LayerInput(nn.Module):
    """Computes what one layer makes of its input: ``norm(projection(act(gate(x)) * given))``."""

    def __init__(self, decoder: DecoderConfig, config: LayerInputsConfig, build: BuildContext) -> None:
        super().__init__()
        self.activation = decoder.activation
        self.gate = Linear(decoder.hidden_size, config.width, build.at("gate"), bias=False)
        self.projection = Linear(config.width, decoder.hidden_size, build.at("projection"), bias=False)
        self.norm = RMSNorm(decoder.hidden_size, decoder.rms_norm_eps, build, offset=decoder.norm_offset)

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Map hidden states ``(T, hidden)`` and inputs ``(T, width)`` to what is added, ``(T, hidden)``."""
        return self.norm(self.projection(self.gate.activated(x, self.activation) * given))
