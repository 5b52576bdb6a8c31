"""Ovis2's images: the whole and its tiles, squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ImagesOnly, ModelConfig
from engine.families.ovis2.layout import num_indicators
from engine.families.parsing.processor import require_steps
from engine.families.tiles import TiledImages, best_tiling, require_side, tilings
from engine.vision.crops_config import CropVisionConfig

_COVERED = 0.9
"""Share of an image's area that tiles should show at its own resolution."""


@dataclass(frozen=True, slots=True)
class Ovis2Processor(TiledImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`; grids are those of
    :func:`engine.families.ovis2.layout.parts`.

    Attributes:
        covering: whether tiles should cover the image at its own resolution, else keep its aspect ratio.
    """

    family: ClassVar[str] = "ovis2"
    whole_first: ClassVar[bool] = True

    covering: bool = True

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Ovis2Processor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig)
        require_steps(raw, "do_resize")
        require_side("preprocessor_config.json", raw, vision.image_size)
        if raw.get("do_center_crop"):
            raise CheckpointError(
                "preprocessor_config.json: do_center_crop true is not supported", param="do_center_crop"
            )
        return cls.of_tower(
            config,
            raw,
            options,
            tiled=raw.get("crop_to_patches", False),
            resample=raw.get("resample", 3),
            covering=raw.get("use_covering_area_grid", True),
        )

    def tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.covering:
            return covering_tiling(size, self.side, self.max_tiles)
        return best_tiling(size, self.side, self.min_tiles, self.max_tiles)

    def check(self, size: tuple[int, int]) -> int:
        grid = self.grid(size)
        return grid[0] * self.rows + num_indicators(grid)

    @property
    def _options(self) -> dict[str, Any]:
        return {"tiled": self.tiled, "tiles": (self.min_tiles, self.max_tiles), "covering": self.covering}


@lru_cache(maxsize=1024)
def covering_tiling(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """The tiling ``(columns, rows)`` with the fewest tiles that show most of an image of ``(width, height)``.

    As Transformers' ``Ovis2ImageProcessor`` chooses: it compares tilings by their rows and columns, and then
    takes the rows of the best one for columns.
    """
    shares = {(a, b): _covered(size, side, down=a, along=b) for a, b in tilings(1, most)}
    enough = {tiling: share for tiling, share in shares.items() if share > _COVERED}
    if enough:
        return min(enough, key=lambda tiling: (tiling[0] * tiling[1], -enough[tiling]))
    return min(shares, key=lambda tiling: (-shares[tiling], tiling[0] * tiling[1]))


def _covered(size: tuple[int, int], side: int, *, down: int, along: int) -> float:
    """The share of an image's area that ``down`` by ``along`` tiles of ``side`` pixels show.

    A tile shows its part at its own resolution, or shrunk until the longer edge fits.
    """
    widths, heights = _cut(size[0], along), _cut(size[1], down)
    shown = {(w, h): _shown(w, h, side) for w in {*widths} for h in {*heights}}
    # In the order of the tiles: a sum of floats depends on it.
    return sum(shown[w, h] for h in heights for w in widths) / (size[0] * size[1])


def _cut(length: int, count: int) -> list[int]:
    """``count`` parts of a length; the last one has what division leaves over."""
    part = length // count
    return [part] * (count - 1) + [length - part * (count - 1)]


def _shown(width: int, height: int, side: int) -> float:
    longer, shorter = max(width, height), min(width, height)
    return side * (shorter / longer * side) if longer > side else longer * shorter
