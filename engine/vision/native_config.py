"""The configuration of encoders that take images at their own resolution. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class SquaresConfig:
    """The reduction of squares of features in :class:`engine.vision.connector.SquareMerger`.

    Attributes:
        side: of a square, in patches. A last row or column of patches that fills no square gives no row.
        norm_eps: of the RMSNorm before it.
    """

    side: int
    norm_eps: float


@dataclass(frozen=True, slots=True)
class GatedMergerConfig:
    """The merger in :class:`engine.vision.connector.GatedMerger`.

    Attributes:
        intermediate_size: of its gated MLP.
        activation: of that, by its Hugging Face name.
    """

    intermediate_size: int
    activation: str


@dataclass(frozen=True, slots=True)
class FramedMergerConfig:
    """The merger in :class:`engine.vision.connector.FramedMerger`.

    Attributes:
        activation: between its projections of squares, by its Hugging Face name.
        norm_eps: of its RMSNorms.
    """

    activation: str
    norm_eps: float


@dataclass(frozen=True, slots=True)
class TemporalMergerConfig:
    """The merger in :class:`engine.vision.connector.TemporalMerger`.

    Attributes:
        frames: consecutive frames of a video that rows are made of together.
        norm_eps: of its layer norms.
        out_norm_eps: of the RMSNorm of rows.
    """

    frames: int
    norm_eps: float
    out_norm_eps: float


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The merger in :class:`engine.vision.connector.AdapterMerger`.

    Attributes:
        width: of the layers between squares and rows.
        activation: behind each of them, by its Hugging Face name.
        norm_eps: of the RMSNorm of rows.
    """

    width: int
    activation: str
    norm_eps: float


@dataclass(frozen=True, slots=True)
class NativeVisionConfig:
    """A tower of native resolution, and the part that turns its features into rows.

    Attributes:
        tower: the transformer.
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of the square that becomes one row.
        temporal_patch_size: frames that one patch spans; an image is repeated to fill them.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
        window: side, in merged squares, of the windows of an image, counted from its top left corner; blocks
            that aren't in ``tower.full_layers`` attend within windows. None if there are none.
        position_side: side of the square table of learned positions that is interpolated over an image's
            grid; None if there is none.
        position_corners: whether the table's corners lie on the corners of the grid, or its outer edges on
            the grid's edges (``align_corners`` of ``F.interpolate``).
        position_class: whether the checkpoint's table begins with the position of a class token, which no
            patch has.
        position_zeros: whether the table's values fall to 0 beyond the middles of its outer entries; else
            they go on as they are.
        position_swapped: whether the n-th patch of ``h`` rows of ``w`` has the position of the n-th one of
            ``w`` rows of ``h`` (Muse Glimmer); square images have the same either way.
        position_cubic: whether the table is interpolated bicubically, by its edges; else bilinearly.
        merger_norm: kind of the norm in the merger; the tower's if None.
        merger_norm_eps: of this norm; the tower's if None.
        merger_mlp: of the merger; GELU with biases if None.
        merger_hidden: width of its hidden layer; that of the joined features if None.
        merged_features: width of what the merger makes of a square, of which a projection with bias makes a
            row (HyperCLOVA X); None: that is a row.
        deepstack_layers: blocks whose merged output is appended to the rows, in order.
        mlp: the MLP that makes a row of each patch (``merge_size`` 1); None merges patches by a
            :class:`engine.vision.connector.PatchMerger`.
        squares: a reduction of squares of patches to one feature each, before ``mlp``; None if there is none.
        gated: the merger of GLM, instead of the other ones.
        framed: the merger of HunyuanOCR, instead of the other ones: an image has rows of its own before its
            first and behind its last row, and one behind each line.
        temporal: the merger of Ernie 4.5 VL, instead of the other ones: patches are of one frame, and squares
            at the same place of several frames become a row.
        adapter: the merger of Muse Glimmer, instead of the other ones.
    """

    tower: VisionConfig
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    out_features: int
    normalisation: Normalisation
    window: int | None = None
    position_side: int | None = None
    position_corners: bool = True
    position_class: bool = False
    position_zeros: bool = False
    position_swapped: bool = False
    position_cubic: bool = False
    merger_norm: Literal["layer", "rms"] | None = None
    merger_norm_eps: float | None = None
    merged_features: int | None = None
    merger_mlp: MLPConfig | None = None
    merger_hidden: int | None = None
    deepstack_layers: tuple[int, ...] = ()
    mlp: MLPConfig | None = None
    squares: SquaresConfig | None = None
    gated: GatedMergerConfig | None = None
    framed: FramedMergerConfig | None = None
    temporal: TemporalMergerConfig | None = None
    adapter: AdapterConfig | None = None

    @property
    def frames_per_row(self) -> int:
        """Frames of a video that a row is made of."""
        return self.temporal_patch_size * (1 if self.temporal is None else self.temporal.frames)

    def rows(self, grid: tuple[int, ...]) -> int:
        """Embedding rows of an item with ``grid`` ``(t, h, w)`` in patches."""
        t, h, w = grid
        side = self.merge_size if self.squares is None else self.squares.side
        if self.framed is not None:
            return t * (h // side * (w // side + 1) + 2)
        if self.temporal is not None:
            # An image takes the place of all frames.
            t = -(-t // self.temporal.frames)
        return t * (h // side) * (w // side)
