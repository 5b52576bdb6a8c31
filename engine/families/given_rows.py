"""Embedding rows that requests bring in place of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engine.errors import InvalidRequest, MediaTooLarge
from engine.families.base import EmbeddingProcessor, MediaProcessor
from engine.media.keys import embeddings_hash
from engine.media.safetensors import TensorFile, base64_size, decode_base64, is_finite
from engine.media.source import MediaSource, RowsSource
from engine.prompt import MediaItem, PreparedMedia

#: Descriptions that vLLM's clients send under another name.
_SYNONYMS = {"image_sizes": "image_size_list"}
#: Largest number of a description: no image has a longer side.
_LARGEST = 1 << 20


class GivenRows:
    """Checks embedding rows of images, and makes items of them.

    Args:
        width: numbers of a row of the model.
        max_bytes: most bytes of one file.
    """

    def __init__(self, width: int, max_bytes: int) -> None:
        self._width = width
        self._max_bytes = max_bytes

    def decode(self, processor: MediaProcessor, source: MediaSource) -> bytes:
        """The safetensors file that ``source`` brings, once its header is what the model needs.

        Raises:
            MediaTooLarge: it has too many bytes.
            InvalidRequest: it is no such file, or its rows don't fit the description or the model.
        """
        assert source.rows is not None
        payload, where = source.rows.payload, source.where
        if base64_size(payload) > self._max_bytes:
            raise MediaTooLarge(
                f"{where}: the embeddings have more than {self._max_bytes} bytes.", param=where
            )
        self._item(processor, source.rows, TensorFile.announced(payload, where), where)
        return decode_base64(payload, where)

    def prepare(self, processor: MediaProcessor, source: MediaSource, data: bytes) -> PreparedMedia:
        """The item of a decoded file.

        Raises:
            InvalidRequest: as :meth:`decode`, or a number isn't finite.
        """
        assert source.rows is not None
        file = TensorFile.parsed(data, len(data), source.where)
        item = self._item(processor, source.rows, file, source.where)
        rows = file.tensor(data).reshape(item.num_tokens, self._width)
        if not is_finite(rows, file.dtype):
            raise InvalidRequest(f"{source.where} has numbers that are not finite.", param=source.where)
        # The key that the same rows have in multi_modal_data.
        key = embeddings_hash(rows.view(np.uint8), f"torch.{file.dtype}", item)
        return PreparedMedia(replace(item, hash=key), rows, rows=file.dtype)

    def _item(self, processor: MediaProcessor, given: RowsSource, file: TensorFile, where: str) -> MediaItem:
        """The item that the description names; its rows are those of the file, by its shape."""
        if not isinstance(processor, EmbeddingProcessor):
            raise InvalidRequest(f"{where}: this model takes images, but no embeddings of them.", param=where)
        description = _description(processor, given.description, where)
        try:
            item = processor.embedding_item(description, "")
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error.message}", param=where) from None
        wanted = (item.num_tokens, self._width)
        if file.shape not in (wanted, (1, *wanted)):
            raise InvalidRequest(
                f"{where}: the tensor has the shape {file.shape}; this model needs {wanted}: a row for each "
                "placeholder token of the image.",
                param=where,
            )
        return item


def _description(processor: EmbeddingProcessor, given: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The numbers that describe an image, such as ``image_grid_thw``; a list around them is taken off."""
    field = processor.embedding_field
    values = {_SYNONYMS.get(name, name): value for name, value in given.items()}
    name = None if field is None else field.name
    if unknown := values.keys() - {name}:
        wanted = f"the entry {name}" if name else "no further entries"
        raise InvalidRequest(
            f"{where}: {sorted(unknown)[0]!r} is not known; this model takes {wanted}.", param=where
        )
    if field is None:
        return ()
    numbers = values.get(field.name)
    if isinstance(numbers, list) and len(numbers) == 1 and isinstance(numbers[0], list):
        (numbers,) = numbers
    if (
        not isinstance(numbers, list)
        or len(numbers) != len(field.numbers)
        or any(type(number) is not int or not 0 < number <= _LARGEST for number in numbers)
    ):
        raise InvalidRequest(
            f"{where}: this model needs {field.name} beside the rows: a list of {', '.join(field.numbers)}, "
            "positive integers.",
            param=where,
        )
    return tuple(numbers)
