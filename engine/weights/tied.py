"""The head of a model with tied embeddings, where the checkpoint stores a head all the same."""

from __future__ import annotations

from enum import Enum, auto

import torch

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.weights.reader import Rows, read_rows

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
_BYTES_AT_ONCE = 8 << 20


class StoredHead(Enum):
    """The tensors that a checkpoint stores of the embeddings and the head.

    Attributes:
        NONE: the embeddings alone.
        SAME: both, with equal values.
        OTHER: both, with different values: they are not tied, whatever config.json says.
        ALONE: the head alone, whose values are those of the embeddings too.
    """

    NONE = auto()
    SAME = auto()
    OTHER = auto()
    ALONE = auto()


def stored_head(checkpoint: Checkpoint, rules: WeightRules) -> StoredHead:
    """Compare the stored head with the embeddings, as Transformers does before it ties them.

    Both tensors are read if both are stored, until the first difference.

    Args:
        rules: names of the tensors; none of them ignores the head.

    Raises:
        CheckpointError: a file can't be read, or has tensors that the model doesn't have.
    """
    names = rules.assign(checkpoint.tensors)["language"]
    if HEAD not in names:
        return StoredHead.NONE
    if EMBEDDINGS not in names:
        return StoredHead.ALONE
    return StoredHead.SAME if _equal(checkpoint, names[HEAD], names[EMBEDDINGS]) else StoredHead.OTHER


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    infos = checkpoint.tensors[one], checkpoint.tensors[other]
    shape = infos[0].shape
    if infos[1].shape != shape or len(shape) != 2:
        return False
    step = max(1, _BYTES_AT_ONCE // max(1, shape[1] * 8))
    slices = (
        Rows.of(name, info, first, min(first + step, shape[0]))
        for first in range(0, shape[0], step)
        for name, info in zip((one, other), infos, strict=True)
    )
    pieces = read_rows(slices, pinned=False)
    for _, values in pieces:
        expected = values.float()
        if expected is values:
            # The next piece may be read into the same memory.
            expected = values.clone()
        _, values = next(pieces)
        if not torch.equal(values.float(), expected):
            return False
    return True
