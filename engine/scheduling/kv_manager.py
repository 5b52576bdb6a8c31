"""Gives KV blocks to requests, and takes them back."""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import Request
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.prefix_cache import BlockHasher

#: Most blocks that a growing answer is given at once.
_GROWTH = 16
#: Tokens at the end of a prompt that the next turn's prompt may not repeat, such as an open tag of thoughts.
_TEMPLATE_TOKENS = 3
#: Least number of blocks between two images at whose ends the state is kept.
_SPACING = 8
#: Blocks of a long prompt after which the state is kept at the end of a step.
_EVERY = 64


class KVManager:
    """Gives blocks to requests, and finds prefixes that were computed before.

    Args:
        pool: the blocks.
        hasher: names full blocks; None turns prefix caching off.
        block_size: tokens per block.
    """

    def __init__(self, pool: BlockPool, hasher: BlockHasher | None, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._hasher = hasher

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, request: Request) -> list[int]:
        """Blocks that already hold the start of ``request.token_ids``, without taking them.

        The last token is always left to be computed, because its logits are needed. Requests that ask for
        log-probabilities of the prompt, or for the mean of all hidden states, need every position.
        """
        every_position = request.scores_prompt
        if request.pooling is not None:
            every_position = request.pooling.pooling != "last"
        if self._hasher is None or every_position:
            return []
        usable = len(request.token_ids) - 1
        self._extend_hashes(request, request.token_ids, len(request.token_ids))
        found = []
        for key in request.block_hashes[: usable // self.block_size]:
            if (block := self.pool.lookup(key)) is None:
                break
            found.append(block)
        # No request continues inside a range that attends both ways.
        while (end := request.uncut(len(found) * self.block_size)) < len(found) * self.block_size:
            del found[end // self.block_size :]
        snapshots = self.pool.snapshots
        if snapshots is not None:
            while found and snapshots.find(request.block_hashes[len(found) - 1]) is None:
                found.pop()
        return found

    def awaits_snapshot(self, request: Request, cached: list[int]) -> bool:
        """Return True if the step that is being scheduled computes more of ``request`` than its ``cached``
        blocks and keeps the state there, for a request of the same start."""
        snapshots = self.pool.snapshots
        if snapshots is None or request.scores_prompt:
            return False
        usable = (len(request.token_ids) - 1) // self.block_size
        return any(snapshots.is_coming(key) for key in request.block_hashes[len(cached) : usable])

    def snapshot_at(self, request: Request, num_blocks: int) -> int | None:
        """Return the row with the state behind the first ``num_blocks`` blocks, which are cached; None for
        models without states, or where no block is cached."""
        snapshots = self.pool.snapshots
        return (
            None
            if snapshots is None or not num_blocks
            else snapshots.use(request.block_hashes[num_blocks - 1])
        )

    def chunk_end(self, request: Request, start: int, end: int) -> int:
        """Return where a chunk from ``start`` on, which may go on to ``end``, stops so that the state there
        can be kept: at the first boundary of :meth:`_boundaries`, else at the end of a block."""
        if self.pool.snapshots is None:
            return end
        boundary = min((b for b in self._boundaries(request) if start < b <= end), default=None)
        if boundary is not None:
            return boundary
        aligned = end // self.block_size * self.block_size
        return aligned if start < aligned and end < len(request.token_ids) else end

    def _boundaries(self, request: Request) -> set[int]:
        """The ends of blocks up to which other requests are likely to be the same, in tokens.

        Those are the last one within the known tokens, with which a conversation goes on; the one before it,
        where so few tokens follow that they may be a template's own; and the last ones within images and
        videos, about which something else is asked.
        """
        size, last = self.block_size, len(request.token_ids) - 1
        found = {last // size * size, max(0, last - _TEMPLATE_TOKENS) // size * size}
        before = -_SPACING * size
        for span in request.spans:
            end = (span.offset + span.length) // size * size
            if end - before >= _SPACING * size:
                found.add(end)
                before = end
        return found

    def keep_state(self, request: Request, start: int, end: int) -> int | None:
        """Return the row that keeps the state behind the first ``end`` tokens, of which this step computes
        those from ``start`` on; None if it is not kept. Called after :meth:`publish`."""
        snapshots = self.pool.snapshots
        if snapshots is None or end % self.block_size or end >= len(request.token_ids):
            return None
        stretch = _EVERY * self.block_size
        if end // stretch == start // stretch and end not in self._boundaries(request):
            return None
        return snapshots.take(request.block_hashes[end // self.block_size - 1])

    def admit(self, request: Request, cached: list[int], reserve: int) -> bool:
        """Give ``request`` its cached blocks and fresh ones for all its tokens; False if that leaves fewer
        than ``reserve`` blocks free."""
        fresh = self.blocks_for(len(request.token_ids)) - len(cached)
        revived = sum(self.pool.is_free(block) for block in cached)
        if fresh + revived + reserve > self.pool.num_free:
            return False
        for block in cached:
            self.pool.share(block)
        request.blocks = cached + self.pool.allocate(fresh)
        return True

    def grow(self, request: Request) -> list[int]:
        """Append one block to a request, or up to ``_GROWTH`` if over a quarter of the pool is free.

        With blocks in reserve most steps need no update of the block tables on the device.

        Returns:
            The new blocks; empty if none is free.
        """
        lacking = self.blocks_for(request.max_total) - len(request.blocks)
        count = min(_GROWTH, lacking) if self.pool.num_free > self.pool.capacity // 4 else 1
        if count > self.pool.num_free:
            return []
        blocks = self.pool.allocate(count)
        request.blocks += blocks
        return blocks

    def publish(self, request: Request, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks of the first ``num_computed`` tokens findable.

        Args:
            token_ids: at least those tokens.
        """
        if self._hasher is None:
            return
        self._extend_hashes(request, token_ids, num_computed)
        # Blocks are published in order: go back until the first one that is published already.
        for index in range(num_computed // self.block_size - 1, -1, -1):
            key = request.block_hashes[index]
            if self.pool.lookup(key) is not None:
                break
            self.pool.publish(request.blocks[index], key)

    def withdraw(self, request: Request, num_computed: int) -> None:
        """Make the request's blocks unfindable from the block of token ``num_computed`` on."""
        first = num_computed // self.block_size
        for block in request.blocks[first:]:
            self.pool.withdraw(block)
        if self.pool.snapshots is not None:
            # Also those behind equal blocks of other requests, which are findable in place of this one's.
            for key in request.block_hashes[first:]:
                self.pool.snapshots.forget(key)

    def _extend_hashes(self, request: Request, token_ids: Sequence[int], end: int) -> None:
        assert self._hasher is not None
        self._hasher.extend(
            request.block_hashes,
            token_ids,
            end,
            request.spans,
            request.cache_salt,
            request.rope_variant,
            request.both_ways,
        )

    def free(self, request: Request) -> None:
        self.pool.release(reversed(request.blocks))
        request.blocks = []
