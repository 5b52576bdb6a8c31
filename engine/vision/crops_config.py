"""The configuration of encoders that take square crops of one size. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class VisualVocabulary:
    """A connector that reads features as words of a vocabulary of their own (Ovis).

    Attributes:
        words: entries of its table of embeddings.
        indicators: how many of these, the last ones, mark the parts of an image; no feature reads as one.
        hard: whether a row is the most likely word's embedding, else all words' by their probabilities.
    """

    words: int
    indicators: int
    hard: bool = False


@dataclass(frozen=True, slots=True)
class GatedSquares:
    """A connector that makes a row of each square of features by a gated MLP (Aya Vision).

    Attributes:
        intermediate_size: of the MLP.
        norm_eps: of a LayerNorm before it; None if there is none.
    """

    intermediate_size: int
    norm_eps: float | None = None


@dataclass(frozen=True, slots=True)
class QueryWindows:
    """A connector of several projectors, each of which makes a row of each square of 2x2 features by learned
    queries that attend within windows, to each other and to the features (Granite 4 Vision).

    Attributes:
        layers: the number of the feature, among those of a patch that lie beside each other, that each of the
            first projectors reads.
        spatial: the same of the last four. Their queries begin as one corner of each square each, those of
            the others as its average.
        order: the projectors whose results are a row's parts.
        side: of a window's queries; a window has twice as many features along its side.
        width: of a feature.
        num_heads, num_blocks, intermediate_size, activation, norm_eps: of each projector's transformer.
    """

    layers: tuple[int, ...]
    spatial: int
    order: tuple[int, ...]
    side: int
    width: int
    num_heads: int
    num_blocks: int
    intermediate_size: int
    activation: str
    norm_eps: float


@dataclass(frozen=True, slots=True)
class CropVisionConfig:
    """A tower of fixed resolution, and a connector: an MLP, or a projection of shuffled pixels.

    Attributes:
        tower: the transformer; its positions are those of one crop's patches.
        image_size: side of a crop in pixels.
        patch_size: side of a patch in pixels.
        drop_first: whether the first token's feature is left out: the class token's if there is one.
        out_features: width of a row.
        mlp: the MLP connector; None makes a row of a feature by one projection with bias.
        pixel_shuffle: side, in patches, of the square that becomes one row; None makes one row of each patch.
        shuffled_mlp: whether a square becomes a row by a LayerNorm and the MLP, else by a single projection.
        gated: makes rows of shuffled squares; None without it.
        vocabulary: makes rows of shuffled squares; None without it.
        windows: makes rows of squares; None without it.
        averaged: side, in patches, of the square whose average becomes one row; None averages nothing.
        bucketed_positions: whether a patch's learned position depends on its place relative to the image's
            size, as in towers that also take images of other sizes; else on its index.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    image_size: int
    patch_size: int
    drop_first: bool
    out_features: int
    normalisation: Normalisation
    mlp: MLPConfig | None = field(default_factory=MLPConfig)
    pixel_shuffle: int | None = None
    shuffled_mlp: bool = False
    gated: GatedSquares | None = None
    vocabulary: VisualVocabulary | None = None
    windows: QueryWindows | None = None
    averaged: int | None = None
    bucketed_positions: bool = False

    @property
    def grid_side(self) -> int:
        """Patches along a crop's side."""
        return self.image_size // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        return self.grid_side**2

    @property
    def rows_per_crop(self) -> int:
        if self.pixel_shuffle is not None:
            return self.patches_per_crop // self.pixel_shuffle**2
        if self.windows is not None:
            return self.patches_per_crop // 4
        if self.averaged is not None:
            return self.patches_per_crop // self.averaged**2
        return self.patches_per_crop + self.tower.class_token - self.drop_first
