"""A connector that reads features as words of a visual vocabulary (Ovis)."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.vision.crops_config import VisualVocabulary
from engine.vision.pixel_shuffle import shuffled

_NORM_EPS = 1e-5


class VocabularyConnector(nn.Module):
    """Makes rows of features: the embeddings of words, weighted by how likely a square reads as each.

    Args:
        width: of a feature.
        side: features along a crop's side.
        factor: side, in features, of the square that becomes one row; divides ``side``.
        out_features: width of a row.
    """

    def __init__(
        self,
        width: int,
        side: int,
        factor: int,
        vocabulary: VisualVocabulary,
        out_features: int,
        build: BuildContext,
    ) -> None:
        super().__init__()
        self.side, self.factor, self.hard = side, factor, vocabulary.hard
        self.words = vocabulary.words - vocabulary.indicators
        self.head = Linear(width * factor**2, self.words, build, bias=False)
        self.norm = LayerNorm(self.words, _NORM_EPS, build)
        self.table = build.parameter(vocabulary.words, out_features)

    @property
    def indicators(self) -> torch.Tensor:
        """Embeddings ``(indicators, out_features)`` of the words that mark the parts of an image."""
        return self.table[self.words :]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows ``(crops, rows, out_features)`` of features ``(crops, side², width)``."""
        scores = self.norm(self.head(shuffled(x, self.side, self.factor)))
        if self.hard:
            return F.embedding(scores.argmax(-1), self.table)
        return scores.softmax(-1) @ self.table[: self.words]

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "table", self.table)]
