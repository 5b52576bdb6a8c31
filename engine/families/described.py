"""Descriptions of pictures that come as embedding rows."""

from __future__ import annotations

from engine.errors import InvalidRequest

#: The entry of ``multi_modal_data["image"]`` that gives the size of each picture.
SIZE_FIELD = "image_size_list"


def described_size(description: tuple[int, ...] | None) -> tuple[int, int]:
    """``(width, height)`` of a picture that a caller describes.

    Raises:
        InvalidRequest: it isn't two numbers.
    """
    if description is None or len(description) != 2:
        raise InvalidRequest(
            f"{SIZE_FIELD} must hold (width, height) of each picture; got {description}.",
            param="multi_modal_data.image",
        )
    return description[0], description[1]
