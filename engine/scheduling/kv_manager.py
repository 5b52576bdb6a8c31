"""Gives KV blocks to requests, and takes them back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from engine.request import Request
from engine.scheduling.batch import TableUpdate
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

    A request has a list of blocks for each group of layers. Groups without a window get blocks for all its
    known tokens when it is admitted. Groups with a window get them chunk by chunk, and give back those behind
    the window: to later tokens they are hidden. Blocks that were given back stay findable like any others.

    Args:
        pool: the blocks.
        hasher: names full blocks; None turns prefix caching off.
        block_size: tokens per block.
        windows: sliding window of each group of layers in tokens; None where all tokens are seen.
        step_tokens: most tokens of a step; only needed with windows.
    """

    def __init__(
        self,
        pool: BlockPool,
        hasher: BlockHasher | None,
        block_size: int,
        *,
        windows: Sequence[int | None] = (None,),
        step_tokens: int = 0,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._hasher = hasher
        self._windows = tuple(windows)
        self._step_tokens = step_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that a group without a window needs."""
        return -(-num_tokens // self.block_size)

    @property
    def longest(self) -> int:
        """The longest sequence, in tokens, that the pool has blocks for."""
        counts = range(self.pool.capacity + 1)
        return self.block_size * (
            bisect_right(
                counts,
                self.pool.capacity,
                key=lambda count: sum(min(count, self._most(window, count)) for window in self._windows),
            )
            - 1
        )

    def _most(self, window: int | None, count: int) -> int:
        """Return the most blocks that a group holds of a sequence of ``count`` blocks.

        At most they are those of a step's tokens and of the window before the first of them.
        """
        if window is None:
            return count
        return min(count, self.blocks_for(window - 1 + self._step_tokens) + 1)

    def _first_seen(self, window: int | None, position: int) -> int:
        """Return the first block that the token at ``position`` and later ones see."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def cached_prefix(self, request: Request) -> list[list[int]]:
        """Blocks of each group that already hold the start of ``request.token_ids``, without taking them; 0
        in place of those that no later token sees.

        The last token is always left to be computed, because its logits are needed. Requests that ask for
        log-probabilities of the prompt, or for the mean of all hidden states, need every position.
        """
        every_position = request.scores_prompt
        if request.pooling is not None:
            every_position = request.pooling.pooling != "last"
        if self._hasher is None or every_position:
            return [[] for _ in self._windows]
        self.name_blocks(request)
        usable = (len(request.token_ids) - 1) // self.block_size
        leading = self._leading(request, usable)
        count = min(map(len, leading.values()), default=usable)
        while count and (fewer := self._at_most(request, count)) < count:
            count = fewer
        return [
            leading[group][:count]
            if window is None
            else [
                self._find(request, column, group) or 0 if column >= first else 0 for column in range(count)
            ]
            for group, window in enumerate(self._windows)
            for first in [self._first_seen(window, count * self.block_size)]
        ]

    def name_blocks(self, request: Request) -> None:
        """Compute the hashes of the blocks of ``request.token_ids``, as far as they are missing."""
        if self._hasher is not None:
            self._extend_hashes(request, request.ids, len(request.token_ids))

    def _leading(self, request: Request, count: int) -> dict[int, list[int]]:
        """Return, for each group of layers without a window, those of the first ``count`` blocks that can be
        found, up to the first that can't."""
        hashes = request.block_hashes
        return {
            group: self.pool.leading(_key(digest, group) for digest in islice(hashes, count))
            if group
            else self.pool.leading(islice(hashes, count))
            for group, window in enumerate(self._windows)
            if window is None
        }

    def _at_most(self, request: Request, count: int) -> int:
        """Return ``count`` if ``request`` can go on behind its first ``count`` blocks, which :meth:`_leading`
        has found; else a smaller number. It can't go on behind any number between."""
        end = count * self.block_size
        # No request continues inside a range that attends both ways.
        if (uncut := request.uncut(end)) < end:
            return uncut // self.block_size
        snapshots = self.pool.snapshots
        if snapshots is not None and snapshots.find(request.block_hashes[count - 1]) is None:
            return count - 1
        for group, window in enumerate(self._windows):
            for column in range(count - 1, self._first_seen(window, end) - 1, -1) if window else ():
                if self._find(request, column, group) is None:
                    return column
        return count

    def _find(self, request: Request, column: int, group: int) -> int | None:
        return self.pool.lookup(_key(request.block_hashes[column], group))

    def awaits_snapshot(self, request: Request, num_cached: int) -> bool:
        """Return True if the step that is being scheduled computes more of the start of ``request`` than its
        ``num_cached`` cached blocks, for another request, and keeps the state there."""
        snapshots = self.pool.snapshots
        if snapshots is None or request.scores_prompt:
            return False
        usable = (len(request.token_ids) - 1) // self.block_size
        return any(snapshots.is_coming(key) for key in request.block_hashes[num_cached:usable])

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

    def admit(self, request: Request, cached: list[list[int]], reserve: int) -> bool:
        """Give ``request`` its cached blocks, and fresh ones for all its tokens in groups without a window;
        False if that, and what its chunks will need of other groups, leaves fewer than ``reserve`` blocks
        free."""
        total = self.blocks_for(len(request.token_ids))
        fresh = 0
        for window, blocks in zip(self._windows, cached, strict=True):
            unseen = self._first_seen(window, len(blocks) * self.block_size)
            fresh += self._most(window, total - unseen) - (len(blocks) - unseen)
        held = [block for blocks in cached for block in blocks if block]
        revived = self.pool.count_free(held)
        if fresh + revived + reserve > self.pool.num_free:
            return False
        self.pool.share(held)
        request.blocks = [
            blocks if window else blocks + self.pool.allocate(total - len(blocks))
            for window, blocks in zip(self._windows, cached, strict=True)
        ]
        return True

    def leave_behind(self, request: Request, position: int) -> list[TableUpdate]:
        """Give back the blocks that the token at ``position`` and later ones don't see."""
        assert request.slot is not None
        updates = []
        for group, start, end in self._behind(request, position):
            blocks, nothing = request.blocks[group], [0] * (end - start)
            self.pool.release(blocks[start:end])
            blocks[start:end] = nothing
            # Kernels may read keys before the window and ignore them. Block 0 has no other request's.
            updates.append(TableUpdate(request.slot, start, nothing, group))
        return updates

    def _behind(self, request: Request, position: int) -> Iterator[tuple[int, int, int]]:
        """Each group's range of blocks that :meth:`leave_behind` gives back: group, start and end."""
        for group, (window, blocks) in enumerate(zip(self._windows, request.blocks, strict=True)):
            start = end = min(self._first_seen(window, position), len(blocks))
            while start and blocks[start - 1]:
                start -= 1
            if start < end:
                yield group, start, end

    def reach(self, request: Request, start: int, end: int) -> int:
        """Return how far a chunk from ``start`` on can go, at most to ``end``, with the blocks that are free
        or that it gives back."""
        windowed = [blocks for window, blocks in zip(self._windows, request.blocks, strict=True) if window]
        if not windowed:
            return end
        free = self.pool.num_free + sum(
            not self.pool.is_shared(block)
            for group, first, last in self._behind(request, start)
            for block in request.blocks[group][first:last]
        )
        return min(end, (len(windowed[0]) + free // len(windowed)) * self.block_size)

    def cover(self, request: Request, end: int) -> list[TableUpdate]:
        """Give a request the blocks for its tokens up to ``end`` that it lacks; see :meth:`reach`."""
        return self._extend(request, self.blocks_for(end))

    def grow(self, request: Request) -> list[TableUpdate]:
        """Append a block of each group to a request, or up to ``_GROWTH`` if over a quarter of the pool is
        free.

        With blocks in reserve most steps need no update of the block tables on the device.

        Returns:
            The new blocks; empty if too few are free.
        """
        count, groups = len(request.blocks[0]), len(self._windows)
        lacking = self.blocks_for(request.max_total) - count
        extra = min(_GROWTH, lacking) if self.pool.num_free > self.pool.capacity // 4 else 1
        if extra * groups > self.pool.num_free:
            extra = 1
        return self._extend(request, count + extra) if extra * groups <= self.pool.num_free else []

    def _extend(self, request: Request, count: int) -> list[TableUpdate]:
        """Give a request fresh blocks where groups have fewer than ``count``."""
        assert request.slot is not None
        updates = []
        for group, blocks in enumerate(request.blocks):
            if len(blocks) < count:
                fresh = self.pool.allocate(count - len(blocks))
                updates.append(TableUpdate(request.slot, len(blocks), fresh, group))
                blocks += fresh
        return updates

    def publish(self, request: Request, token_ids: Sequence[int] | np.ndarray, num_computed: int) -> None:
        """Make the full blocks of the first ``num_computed`` tokens findable.

        Args:
            token_ids: at least those tokens.
        """
        if self._hasher is None:
            return
        self._extend_hashes(request, token_ids, num_computed)
        for group, blocks in enumerate(request.blocks):
            # Blocks are published in order: go back until the first one that is published already.
            for index in range(num_computed // self.block_size - 1, -1, -1):
                key = _key(request.block_hashes[index], group)
                if not blocks[index] or self.pool.lookup(key) is not None:
                    break
                self.pool.publish(blocks[index], key)

    def withdraw(self, request: Request, num_computed: int) -> None:
        """Make the request's blocks unfindable from the block of token ``num_computed`` on."""
        first = num_computed // self.block_size
        for blocks in request.blocks:
            for block in blocks[first:]:
                self.pool.withdraw(block)
        if self.pool.snapshots is not None:
            # Also those behind equal blocks of other requests, which are findable in place of this one's.
            for key in request.block_hashes[first:]:
                self.pool.snapshots.forget(key)

    def _extend_hashes(self, request: Request, token_ids: Sequence[int] | np.ndarray, end: int) -> None:
        assert self._hasher is not None
        self._hasher.extend(
            request.block_hashes,
            token_ids,
            end,
            request.spans,
            request.cache_salt,
            request.rope_variant,
            request.both_ways,
            request.num_prompt,
        )

    def free(self, request: Request) -> None:
        for blocks in request.blocks:
            self.pool.release(block for block in reversed(blocks) if block)
        request.blocks = []


def _key(digest: bytes, group: int) -> bytes:
    """The name of a group's block of the tokens that ``digest`` stands for."""
    return digest + bytes((group,)) if group else digest
