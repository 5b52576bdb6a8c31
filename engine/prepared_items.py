"""Remembers prepared items: a conversation sends the images of its earlier turns with every request."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from engine.families.base import MediaProcessor
from engine.lru import LruCache
from engine.media.keys import files_digest
from engine.media.ledger import Account
from engine.media.source import MediaSource
from engine.preparation import MediaPreparation, for_item
from engine.prompt import KeptFiles, PreparedMedia


@dataclass(slots=True)
class PreparedCounters:
    """Items since the start: ``hits`` were remembered, ``misses`` were prepared."""

    hits: int = 0
    misses: int = 0


class PreparedItems:
    """Prepares items, or finds them among those that were prepared before. Thread-safe.

    An item is the same only if its files, its processor with all options, the frames or the page asked for,
    and the salt are the same. Only whole successes are kept, never errors. Embedding rows that a caller gives
    are not.

    Args:
        preparation: prepares what is not known.
        budget: bytes of the pixels that are kept; 0 keeps none.
    """

    def __init__(self, preparation: MediaPreparation, budget: int) -> None:
        self._preparation = preparation
        self._lock = threading.Lock()
        self._cache: LruCache[PreparedMedia] = LruCache(budget)
        self._counters = PreparedCounters()

    def prepare(
        self,
        processor: MediaProcessor,
        source: MediaSource,
        files: Sequence[bytes],
        account: Account | None = None,
        salt: str = "",
    ) -> PreparedMedia:
        """Prepare one item; arguments and errors as :meth:`MediaPreparation.prepare`.

        Args:
            salt: keeps apart the caches of tenants: how long an answer takes must not tell one what another
                has sent.
        """
        if source.rows is not None or not self._cache.budget:
            return self._preparation.prepare(processor, source, files, account)
        key = _key(processor, source, files_digest(files), salt)
        found = self._find(key)
        if found is None:
            made = self._preparation.prepare(processor, source, files, account)
            self._keep(key, made)
            return made
        if source.is_video_file and account is not None:
            # Decoding it would charge the same.
            width, height = found.item.size
            account.charge("frames", found.frames, source.where)
            account.charge("pixels", found.frames * width * height, source.where)
        return found

    def prepare_pages(
        self, processor: MediaProcessor, pages: Sequence[MediaSource], file: KeptFiles, salt: str = ""
    ) -> list[PreparedMedia]:
        """Render and prepare pages of one file; errors as :meth:`MediaPreparation.prepare_pages`.

        Args:
            processor, pages: as there.
            file: the file, with its bytes.
            salt: as for :meth:`prepare`.
        """
        if not self._cache.budget:
            return self._preparation.prepare_pages(processor, pages, file.files[0])
        keys = [_key(processor, page, file.digest, salt) for page in pages]
        found = {key: self._find(key) for key in keys}
        missing = [page for key, page in zip(keys, pages, strict=True) if found[key] is None]
        made: dict[Hashable, PreparedMedia] = {}
        if missing:
            rendered = self._preparation.prepare_pages(processor, missing, file.files[0])
            unknown = [key for key in keys if found[key] is None]
            made = dict(zip(unknown, rendered, strict=True))
            for key, media in made.items():
                self._keep(key, media)
        return [found[key] or made[key] for key in keys]

    def limit(self, budget: int) -> None:
        """Keep no more than ``budget`` bytes, now and later."""
        with self._lock:
            self._cache.limit(budget)

    def metrics(self) -> dict[str, int]:
        """Hits and misses since the start; items and bytes that are kept now."""
        with self._lock:
            return {
                "cache_hits": self._counters.hits,
                "cache_misses": self._counters.misses,
                "cached_items": len(self._cache),
                "cached_bytes": self._cache.bytes,
            }

    def _find(self, key: Hashable) -> PreparedMedia | None:
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                self._counters.misses += 1
            else:
                self._counters.hits += 1
            return found

    def _keep(self, key: Hashable, media: PreparedMedia) -> None:
        # A view would keep the memory of the whole array.
        if media.pixels.base is not None and media.pixels.base.nbytes > media.pixels.nbytes:
            media = replace(media, pixels=media.pixels.copy())
        with self._lock:
            self._cache.put(key, media, media.pixels.nbytes)


def _key(processor: MediaProcessor, source: MediaSource, digest: str, salt: str) -> Hashable:
    """All that a prepared item depends on, but for the limits, which are those of the process."""
    shown = for_item(processor, source)
    return shown, source.kind, source.is_video_file, source.video, source.page, digest, salt
