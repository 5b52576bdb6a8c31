"""Names KV blocks by their content: a hash chain over tokens and the media that overlap them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from engine.prompt import MediaSpan

_DIGEST = 16


class BlockHasher:
    """Chains block hashes.

    Two blocks get the same hash only if everything that their keys and values depend on is the same: the
    model, the tenant's salt, the rotary frequencies, all tokens up to the block's end, and content and place
    of every media item up to there; or up to the end of a range that attends both ways, if the block's end is
    inside one. The chain's root is keyed with a secret of this engine, so that hashes
    can't be predicted from outside.

    Args:
        block_size: tokens per block.
        model_key: identifies the weights: name, revision and architecture.
        secret: at most 64 bytes.
        told_apart: ids of tokens whose keys and values in an answer are others than in a prompt.
    """

    def __init__(
        self, block_size: int, model_key: str, secret: bytes = b"", told_apart: Sequence[int] = ()
    ) -> None:
        self.block_size = block_size
        self._model_key = model_key.encode()
        self._secret = secret
        self._told_apart = told_apart
        # The last one, since few callers have salts. Several threads read and write it, each in one go.
        self._root: tuple[str, int, bytes] | None = None

    def root(self, salt: str, rope_variant: int = 0) -> bytes:
        """The parent of a sequence's first block, for a tenant's salt and rotary frequencies."""
        if (held := self._root) is not None and held[:2] == (salt, rope_variant):
            return held[2]
        hashed = blake2b(self._model_key, digest_size=_DIGEST, key=self._secret)
        hashed.update(b"\0" + rope_variant.to_bytes(8, "big") + salt.encode())
        digest = hashed.digest()
        self._root = salt, rope_variant, digest
        return digest

    def extend(
        self,
        hashes: list[bytes],
        token_ids: Sequence[int] | np.ndarray,
        end: int,
        spans: Sequence[MediaSpan],
        salt: str,
        rope_variant: int = 0,
        both_ways: Sequence[tuple[int, int]] = (),
        num_prompt: int | None = None,
    ) -> None:
        """Append to ``hashes`` those of all full blocks of ``token_ids[:end]`` that it lacks.

        Args:
            token_ids: at least those tokens, and the rest of a range that attends both ways and reaches
                into them.
            spans, rope_variant, both_ways: see :class:`~engine.request.Request`.
            num_prompt: length of the prompt; None if there is no answer.
        """
        size = self.block_size
        start = len(hashes) * size
        if end - start < size:
            return
        last = max([end, *(stop for first, stop in both_ways if first < end)])
        numbers = np.asarray(token_ids[start:last], np.int32)
        if self._told_apart and num_prompt is not None:
            numbers = numbers.copy()
            answer = numbers[max(num_prompt - start, 0) :]
            apart = np.isin(answer, self._told_apart)
            answer[apart] = -1 - answer[apart]
        tokens = numbers.tobytes()
        parent = hashes[-1] if hashes else self.root(salt, rope_variant)
        # The first ones that don't end before the block: a long prompt may have a hundred images.
        next_range = next_span = 0
        # One call of the hash function for each block: this runs for each block of each prompt.
        for first in range(start, end - size + 1, size):
            content, place, reach = parent, (first - start) * 4, first + size
            if both_ways:
                while next_range < len(both_ways) and both_ways[next_range][1] <= first:
                    next_range += 1
                for begin, stop in islice(both_ways, next_range, None):
                    if begin >= first + size:
                        break
                    content += f"|{begin - first}-{stop - first}".encode()
                    reach = max(reach, stop)
            content += tokens[place : place + (reach - first) * 4]
            if spans:
                while next_span < len(spans) and spans[next_span].offset + spans[next_span].length <= first:
                    next_span += 1
                for span in islice(spans, next_span, None):
                    if span.offset >= reach:
                        break
                    content += f"|{span.item.hash}@{span.offset - first}".encode()
            parent = blake2b(content, digest_size=_DIGEST).digest()
            hashes.append(parent)
