"""The pool of KV block numbers: reference counts, eviction order, and the map from content to block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from engine.scheduling.snapshots import SnapshotPool


class BlockPool:
    """``num_blocks`` blocks. Block 0 is never allocated: padding rows write there.

    A block without references stays findable by its hash until it is allocated again. The block that has been
    free for longest is allocated first.

    Args:
        num_blocks: with block 0.
        snapshots: states behind some of the findable blocks, for models with recurrent states; None for
            others.
    """

    def __init__(self, num_blocks: int, snapshots: SnapshotPool | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks, got {num_blocks}")
        self.num_blocks = num_blocks
        self.snapshots = snapshots
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def capacity(self) -> int:
        """Number of blocks that can be in use at once."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Number of blocks that can be found by their hash."""
        return len(self._block_of)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, the oldest free ones first. The caller checked ``num_free``."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            if block in self._hash_of:
                self.withdraw(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of the blocks, which :meth:`lookup` has found."""
        refs, free = self._refs, self._free
        for block in blocks:
            if refs[block] == 0:
                del free[block]
            refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each. Give a sequence's last block first: its tail is reused first."""
        for block in blocks:
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} released twice"
            if self._refs[block] == 0:
                self._free[block] = None

    def lookup(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def leading(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of ``keys``, up to the first one that :meth:`lookup` would not find."""
        block_of, found = self._block_of, []
        # A long conversation has thousands of blocks.
        for key in keys:
            if (block := block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """Return how many of the blocks are free."""
        refs = self._refs
        return sum(refs[block] == 0 for block in blocks)

    def is_shared(self, block: int) -> bool:
        """Return True if the block stays in use when one of its references is dropped."""
        return self._refs[block] > 1

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable, unless another block with the same content is findable already."""
        if key not in self._block_of and block not in self._hash_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def withdraw(self, block: int) -> None:
        """Make a block unfindable, if it was findable: its content will change, or may not match its hash."""
        if (key := self._hash_of.pop(block, None)) is not None:
            del self._block_of[key]
            if self.snapshots is not None:
                self.snapshots.forget(key)

    def withdraw_all(self) -> None:
        """Make all blocks unfindable."""
        self._block_of.clear()
        self._hash_of.clear()
        if self.snapshots is not None:
            self.snapshots.forget_all()

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, free list and cache agree."""
        for block in range(1, self.num_blocks):
            assert (self._refs[block] == 0) == (block in self._free), f"block {block} is lost"
        assert 0 not in self._free, "block 0 was handed out"
        assert self._refs[0] == 0, "block 0 was handed out"
        for key, block in self._block_of.items():
            assert self._hash_of.get(block) == key, f"cache and block {block} disagree"
        assert len(self._hash_of) == len(self._block_of)
        if self.snapshots is not None:
            self.snapshots.check_integrity()
            assert self.snapshots.keys() <= self._block_of.keys(), "a snapshot has lost its block"
