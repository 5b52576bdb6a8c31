"""Content hashes of media, and what every key in the engine holds.

A cached value may only be served where everything that it depends on is the same. Values that depend on the
weights are cached within one engine, so their keys don't hold the model, except where the table says so.

=========================  =================================  ==============================================
cached value               key                                parts of the key
=========================  =================================  ==============================================
item prepared from pixels  :func:`content_hash`               pixels (dtype, shape, bytes), family, the
                                                              processor's options, kind, size; for a video
                                                              also the times of its frames
item given as embeddings   :func:`embeddings_hash`            rows (dtype, shape, bytes), kind, grid, size,
                                                              times, placeholder
files kept by ``uuid``     ``deployments.references``:        caller's key and salt, model, ``uuid``; a
                           owner and ``uuid``                 digest of the bytes tells other content
prepared item              ``PreparedItems``: digest, and     digest of the files, the processor with all its
                           what is asked of the files         options, kind, frames or page asked for, salt
encoder's embedding rows   ``engine.encoder``,                tenant's salt, content hash
                           ``engine.offline``: salt and
                           the item's hash
KV block                   ``BlockHasher``: chain of hashes   engine's secret, model, tenant's salt, rotary
                                                              variant, every token up to the block's end (or
                                                              that of a range that attends both ways), hash
                                                              and place of every item up to there
copy of recurrent states   hash of the last KV block before   as the KV block; it goes with that block
                           it, ``SnapshotPool``
grammar                    ``StructuredSpec``                 kind and text; one cache per tokenizer
forms of message content   ``ContentForms``: role and tools   role, whether there are tools; one cache per
                                                              template and family
spelling of a text         ``Speller``: the text              the text; one cache per tokenizer
positions within an image  grid in patches                    one cache per vision tower
=========================  =================================  ==============================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.media.crew import crew
from engine.prompt import KeptFiles, MediaItem

#: Bytes of a content that are hashed by themselves, so that several threads may hash. Part of the key.
_PART = 1 << 20


def content_hash(
    pixels: np.ndarray, *, family: str, options: Mapping[str, Any], kind: str, size: tuple[int, int]
) -> str:
    """Hex key of a prepared item: equal only where the item and its encoded rows are.

    Args:
        pixels: the encoder's input; its dtype, shape and bytes all count.
        options: the processor's options that the result depends on, as plain JSON.
        kind: ``image`` or ``video``.
        size: ``(width, height)`` of the image that the processor got.
    """
    return _hash([family, dict(sorted(options.items())), kind, list(size)], str(pixels.dtype), pixels)


def embeddings_hash(rows: np.ndarray, dtype: str, item: MediaItem) -> str:
    """Hex key of an item whose embedding rows a caller gives.

    Args:
        rows: the rows, or their bytes with the row as the first dimension.
        dtype: the rows' own dtype.
        item: what the rows are said to be; its ``hash`` is not looked at.
    """
    runs = [[run.token_id, run.count, run.is_embed] for run in item.placeholder]
    item_parts = [item.kind, list(item.grid), list(item.size), list(item.times), runs]
    return _hash(["embeddings", *item_parts], dtype, rows)


def files_digest(files: Sequence[bytes]) -> str:
    """Hex hash of an item's encoded files, each with its length."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(len(file).to_bytes(8))
        digest.update(file)
    return digest.hexdigest()


def kept_files(files: Sequence[bytes]) -> KeptFiles:
    """An item's encoded files with their digest, for later requests that name the item."""
    return KeptFiles(list(files), files_digest(files), sum(map(len, files)))


def _hash(described: list[Any], dtype: str, content: np.ndarray) -> str:
    # CPUs have instructions for SHA-256: an image takes half of BLAKE2's time.
    digest = hashlib.sha256(json.dumps([described, dtype, list(content.shape)]).encode())
    data = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    starts = range(0, len(data), _PART)
    found = [b""] * len(starts)

    def work(part: int, parts: int) -> None:
        for index in range(part, len(starts), parts):
            found[index] = hashlib.sha256(data[starts[index] : starts[index] + _PART].data).digest()

    helping = crew()
    if helping is None:
        work(0, 1)
    else:
        helping.share(work, len(starts))
    digest.update(b"".join(found))
    return digest.hexdigest()
