"""The geometry of images as a whole and in tiles (LLaVA-NeXT, LLaVA-OneVision). No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.vision.crops_config import CropVisionConfig

_SHRINK_FROM = 1.1
Pinpoints = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class AnyresConfig:
    """A tower for square crops, and the tilings of images.

    Attributes:
        crops: the tower and its connector.
        pinpoints: ``(height, width)`` in pixels of the tilings to choose from, multiples of a crop's side.
        max_tiles: features of more tiles are shrunk to the number of features of this many; None never
            shrinks them.
    """

    crops: CropVisionConfig
    pinpoints: Pinpoints
    max_tiles: int | None = None

    @property
    def parts(self) -> int:
        """Equal parts of a row, each of which is the newline parameter in a newline row."""
        windows = self.crops.windows
        return 1 if windows is None else len(windows.order)

    @property
    def side(self) -> int:
        """Rows along a crop's side."""
        return math.isqrt(self.crops.rows_per_crop)

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles in a column and in a row for an image of ``(width, height)`` pixels."""
        height, width = best_pinpoint(size, self.pinpoints)
        return height // self.crops.image_size, width // self.crops.image_size

    def rows(self, size: tuple[int, int]) -> int:
        """Embedding rows of an image of ``(width, height)`` pixels.

        They are those of the whole, then those of the tiles with a newline row after each line.
        """
        shown = tiled_rows(size, self.tiles(size), self.side, self.max_tiles)
        return self.crops.rows_per_crop + shown.rows * (shown.columns + 1)


@dataclass(frozen=True, slots=True)
class TiledRows:
    """The part of a tiling's features that the decoder gets.

    Attributes:
        top, left, height, width: the features that are not padding.
        rows, columns: their number after shrinking.
    """

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int


def best_pinpoint(size: tuple[int, int], pinpoints: Pinpoints) -> tuple[int, int]:
    """The pinpoint ``(height, width)`` that keeps most pixels of an image of ``size`` ``(width, height)``; of
    several, the one with the least padding."""

    def rating(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[0], pinpoint[0] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=rating)


def tiled_rows(size: tuple[int, int], tiles: tuple[int, int], side: int, max_tiles: int | None) -> TiledRows:
    """The part of the features of an image of ``size`` ``(width, height)`` that the decoder gets.

    The arithmetic, with its rounding, is that of the published models.

    Args:
        size: see above, in pixels.
        tiles: tiles in a column and in a row.
        side: features along a tile's side.
    """
    height, width = tiles[0] * side, tiles[1] * side
    top = left = 0
    if size[0] / size[1] > width / height:
        top = (height - int(round(size[1] * (width / size[0]), 7))) // 2
    else:
        left = (width - int(round(size[0] * (height / size[1]), 7))) // 2
    height, width = height - 2 * top, width - 2 * left
    ratio = 1.0 if max_tiles is None else math.sqrt(height * width / (max_tiles * side**2))
    if ratio > _SHRINK_FROM:
        return TiledRows(top, left, height, width, int(height // ratio), int(width // ratio))
    return TiledRows(top, left, height, width, height, width)
