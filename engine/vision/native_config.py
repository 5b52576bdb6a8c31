"""The switches of encoders that take pictures in their own resolution. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class NativeVisionConfig:
    """A tower of native resolution with a patch merger.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of the square that becomes one row.
        temporal_patch_size: frames that one patch spans; a picture is its own next frame.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
        window: side, in rows, of the squares that a picture divides into, beginning at its top left corner;
            blocks that aren't in ``tower.full_layers`` attend within them. None has no windows.
        position_side: side of the square table of learned positions that is stretched over a picture's grid;
            None has none.
        deepstack_layers: blocks whose output is merged as well and appended to the rows, in order.
    """

    tower: VisionConfig
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    out_features: int
    normalisation: Normalisation
    window: int | None = None
    position_side: int | None = None
    deepstack_layers: tuple[int, ...] = ()
