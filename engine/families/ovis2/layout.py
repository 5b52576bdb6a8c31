"""The order of an image's rows in Ovis2: those of its crops, and those that mark its parts."""

from __future__ import annotations

from collections.abc import Iterator

#: The words that mark an image's parts, in the order of ``visual_indicator_token_ids``.
INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_START, _GRID, _COLUMN, _ROW, _END = range(len(INDICATORS))


def parts(grid: tuple[int, ...]) -> Iterator[int | None]:
    """The parts of an image: None for the rows of its next crop, else the number of an indicator.

    Args:
        grid: ``(crops, rows, columns)``: the whole image and then its tiles, row by row; 1, 0 and 0 for an
            image in one crop.
    """
    _, rows, columns = grid
    yield from (_START, None, _GRID)
    for row in range(rows):
        for column in range(columns):
            if column:
                yield _COLUMN
            elif row:
                yield _ROW
            yield None
    yield _END


def num_indicators(grid: tuple[int, ...]) -> int:
    """The number of rows that mark parts."""
    return sum(part is not None for part in parts(grid))
