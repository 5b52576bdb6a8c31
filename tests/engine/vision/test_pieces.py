"""Pixels that come piece by piece are held against what their grid announces."""

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.pixels import check_pieces

PIECES = [(4, 2), (2, 2), (2, 2)]


def media(patches: int = 16, dtype: type = np.uint8, values: int = 9) -> PreparedMedia:
    item = MediaItem.of_rows("image", "", 7, 4, grid=(4, 2, 1, 2, 2, 2), size=(8, 8))
    return PreparedMedia(item, np.zeros((patches, 3, values), dtype))


def test_pieces_that_fit():
    check_pieces(media(), PIECES, (3, 9), 4, side=2)


@pytest.mark.parametrize(
    ("entry", "pieces", "rows"),
    [
        (media(15), PIECES, 4),
        (media(dtype=np.float32), PIECES, 4),
        (media(values=8), PIECES, 4),
        (media(), PIECES, 3),
        (media(), [(16, 1)], 4),
        (media(), [*PIECES, (0, 2)], 4),
        (media(0), [], 4),
    ],
    ids=["patches", "dtype", "values of a patch", "rows", "side", "an empty piece", "no piece"],
)
def test_pieces_that_do_not_fit(entry, pieces, rows):
    with pytest.raises(InvalidRequest, match="do not fit grid"):
        check_pieces(entry, pieces, (3, 9), rows, side=2)
