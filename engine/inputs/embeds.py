"""Checks embedding rows that a caller gives in place of images.

Only dense floating-point tensors and numpy arrays are accepted, never files: loading a stranger's file with
torch.load can run its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from engine.errors import InvalidRequest
from engine.families.base import EmbeddingField, EmbeddingProcessor, MediaProcessor, PromptAwareProcessor
from engine.media.keys import embeddings_hash
from engine.prompt import MediaItem

if TYPE_CHECKING:
    import torch

_WHERE = "multi_modal_data.image"
_ROWS = "image_embeds"


def is_pixels(value: Any) -> bool:
    """Return whether ``value`` is an image as uint8 numbers: ``(H, W)``, ``(H, W, 3)``, or 4 with opacity."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        return False
    return value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))


def are_embeddings(value: Any) -> bool:
    """Return whether ``multi_modal_data["image"]`` holds embeddings rather than images."""
    if isinstance(value, Mapping):
        return _ROWS in value
    first = value[0] if isinstance(value, list | tuple) and value else value
    if is_pixels(first):
        return False
    return isinstance(first, np.ndarray) or type(first).__module__.partition(".")[0] == "torch"


def given_embeddings(value: Any, processor: MediaProcessor) -> list[tuple[MediaItem, torch.Tensor]]:
    """Check embeddings and give each item with its rows ``(num_tokens, hidden)``.

    Args:
        value: a tensor ``(rows, hidden)`` or ``(items, rows, hidden)``, a list of such, or a mapping with
            ``image_embeds`` and the description that the family needs: Qwen's ``image_grid_thw``
            ``(items, 3)``, others' ``image_size_list`` of ``(width, height)``. With a description the rows
            of all items may also stand in one tensor ``(all rows, hidden)``.

    Raises:
        InvalidRequest: naming the entry that doesn't fit.
    """
    if not isinstance(processor, EmbeddingProcessor):
        raise InvalidRequest("This model takes images, but no embeddings of them.", param=_WHERE)
    field = processor.embedding_field
    name = None if field is None else field.name
    given = dict(value) if isinstance(value, Mapping) else {_ROWS: value}
    if unknown := given.keys() - {_ROWS, name}:
        raise InvalidRequest(f"{_WHERE} has no entry {sorted(map(str, unknown))[0]!r}.", param=_WHERE)
    tensors = _tensors(given[_ROWS])
    hint = (
        "" if isinstance(value, Mapping) else " An array of floats is taken for embeddings; pixels are uint8."
    )
    descriptions: list[tuple[int, ...]] = [()] * len(tensors)
    if field is not None:
        if field.name not in given:
            raise InvalidRequest(f"Embeddings for this model need {name} beside {_ROWS}.{hint}", param=_WHERE)
        descriptions = _descriptions(given[field.name], field)
    describer: EmbeddingProcessor = processor
    if isinstance(processor, PromptAwareProcessor):
        describer = cast(EmbeddingProcessor, processor.among(len(descriptions)))
    counts = [describer.embedding_item(description, "").num_tokens for description in descriptions]
    if len(tensors) == 1 and len(counts) > 1 and len(tensors[0]) == sum(counts):
        tensors = list(tensors[0].split(counts))
    if len(tensors) != len(counts):
        raise InvalidRequest(
            f"{_ROWS} holds {len(tensors)} items, {name} describes {len(counts)}.", param=_WHERE
        )
    found = []
    for index, (rows, count, description) in enumerate(zip(tensors, counts, descriptions, strict=True)):
        if len(rows) != count:
            raise InvalidRequest(
                f"Item {index} of {_ROWS} has {len(rows)} rows; its placeholder in the prompt needs {count}."
                + hint,
                param=_WHERE,
            )
        item = describer.embedding_item(description, "")
        found.append((replace(item, hash=_key(rows, item)), rows))
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    """One ``(rows, hidden)`` tensor per item."""
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    import torch

    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise InvalidRequest(f"{_ROWS} must be a tensor, not {type(value).__name__}.", param=_WHERE)
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise InvalidRequest(f"{_ROWS} must be dense, not {value.layout}.", param=_WHERE)
    if value.is_meta:
        raise InvalidRequest(f"{_ROWS} is on the device meta: it has no numbers.", param=_WHERE)
    if value.dtype == torch.uint8:
        raise InvalidRequest(
            f"{_WHERE} of the shape {tuple(value.shape)} is no image: pixels are (height, width, 3), "
            "(height, width, 4) or (height, width). Embeddings are floating-point numbers.",
            param=_WHERE,
        )
    if not value.is_floating_point():
        raise InvalidRequest(f"{_ROWS} must be of floating-point numbers, not {value.dtype}.", param=_WHERE)
    if value.dim() not in (2, 3):
        raise InvalidRequest(
            f"{_ROWS} must have the shape (items, rows, hidden) or (rows, hidden), not {tuple(value.shape)}.",
            param=_WHERE,
        )
    if not value.isfinite().all():
        raise InvalidRequest(f"{_ROWS} has numbers that are not finite.", param=_WHERE)
    return [value.detach()] if value.dim() == 2 else list(value.detach().unbind(0))


def _descriptions(value: Any, field: EmbeddingField) -> list[tuple[int, ...]]:
    rows = value.tolist() if hasattr(value, "tolist") else value
    try:
        found = [tuple(int(number) for number in row) for row in rows]
    except (TypeError, ValueError):
        raise InvalidRequest(f"{field.name} must be a list of tuples of integers.", param=_WHERE) from None
    for row in found:
        if len(row) != len(field.numbers):
            raise InvalidRequest(
                f"{field.name} must hold ({', '.join(field.numbers)}) of each image; got {row}.", param=_WHERE
            )
        if min(row) < 1:
            raise InvalidRequest(f"{field.name} must be of positive integers.", param=_WHERE)
    return found


def _key(rows: torch.Tensor, item: MediaItem) -> str:
    """Content hash of an item and its rows; a caller's own hash could serve one caller another's blocks."""
    import torch

    data = rows.contiguous().cpu()
    return embeddings_hash(data.view(torch.uint8).numpy(), str(data.dtype), item)
