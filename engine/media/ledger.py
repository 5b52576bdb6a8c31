"""Amounts that the media of open requests take: counted per request, per key and in all, against limits.

Each process has one ledger. An ingress charges what it knows of a request before any work: the number of
items, and the bytes and frames that came with it; then the pixels and tokens of the prepared items. It gives
them back when the request ends. A preprocessor charges bytes as they arrive, pixels as headers announce them
and frames before they are decoded. It gives them back when it has prepared the request.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from pydantic import PositiveInt

from engine.errors import MediaTooLarge, Overloaded
from engine.settings import Settings

Amount = Literal["items", "bytes", "pixels", "frames", "tokens"]
AMOUNTS: tuple[Amount, ...] = get_args(Amount)
_WORDS = {"items": "images and videos", "frames": "video frames", "tokens": "visual tokens"}


class Amounts(Settings):
    """The most of each amount; None is unlimited.

    Attributes:
        items: images and videos.
        bytes: of encoded files.
        pixels: of images and frames, as they were sent.
        frames: of videos that a model is shown.
        tokens: embedding rows.
    """

    items: PositiveInt | None = None
    bytes: PositiveInt | None = None
    pixels: PositiveInt | None = None
    frames: PositiveInt | None = None
    tokens: PositiveInt | None = None

    def of(self, amount: Amount) -> int | None:
        """The limit of one amount."""
        return getattr(self, amount)


class MediaLimits(Settings):
    """The most that media may take at a time, in each ingress replica and in each preprocessor replica.

    Attributes:
        per_request: of one request, beside the limits that ``limit_mm_per_prompt``, ``fetch``, ``images`` and
            ``videos`` state; more is refused with 413.
        per_key: of the open requests of one API key; more is refused with 429. Without keys all callers count
            as one.
        in_all: of all open requests; likewise.
    """

    per_request: Amounts = Amounts()
    per_key: Amounts = Amounts()
    in_all: Amounts = Amounts()


class Ledger:
    """Counts what the media of open requests take. Thread-safe.

    Args:
        limits: the most that they may take.
    """

    def __init__(self, limits: MediaLimits = MediaLimits()) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._all: Counter[Amount] = Counter()
        self._keys: dict[str, Counter[Amount]] = {}

    def account(self, key: str) -> Account:
        """An account for one request of ``key``; it must be closed."""
        return Account(self, key)

    @contextmanager
    def open(self, key: str) -> Iterator[Account]:
        """An account that the block uses."""
        account = Account(self, key)
        try:
            yield account
        finally:
            account.close()

    def held(self, key: str | None = None) -> dict[str, int]:
        """The sum of each amount over open requests: all of them, or those of ``key``."""
        with self._lock:
            counted = self._all if key is None else self._keys.get(key, Counter())
            return {amount: counted[amount] for amount in AMOUNTS}

    @property
    def is_empty(self) -> bool:
        """True if no request holds anything, and nothing is remembered of any."""
        with self._lock:
            return not any(self._all.values()) and not self._keys

    def _add(self, key: str, amount: Amount, count: int) -> None:
        """Count more of a key, or less; the lock is held."""
        self._all[amount] += count
        counted = self._keys.setdefault(key, Counter())
        counted[amount] += count
        if not any(counted.values()):
            del self._keys[key]


class Account:
    """Amounts that the media of one request take."""

    def __init__(self, ledger: Ledger, key: str) -> None:
        self._ledger = ledger
        self._key = key
        self._own: Counter[Amount] = Counter()
        self._closed = False

    def charge(self, amount: Amount, count: int, where: str) -> None:
        """Count ``count`` more, until the account is closed. A closed one counts nothing: a thread may still
        work for a request that has ended.

        Args:
            where: the field of the request, for errors.

        Raises:
            MediaTooLarge: the request alone is beyond a limit.
            Overloaded: the open requests of the key, or of all keys, are.
        """
        ledger = self._ledger
        with ledger._lock:
            if self._closed:
                return
            own = self._own[amount] + count
            limits = ledger.limits
            each = (limits.per_request, limits.per_key, limits.in_all)
            known = [limit for limit in (amounts.of(amount) for amounts in each) if limit is not None]
            name = _WORDS.get(amount, amount)
            if known and own > min(known):
                raise MediaTooLarge(
                    f"{where}: the media of this request have more than the {min(known)} {name} that are "
                    "allowed together; send fewer or smaller ones.",
                    param=where,
                )
            of_key = ledger._keys.get(self._key, Counter())[amount]
            for limit, held, who in (
                (limits.per_key.of(amount), of_key, "this API key's open requests"),
                (limits.in_all.of(amount), ledger._all[amount], "all open requests"),
            ):
                if limit is not None and held + count > limit:
                    raise Overloaded(
                        f"{where}: {who} hold {held} {name} of media, and this one needs {count} more; the "
                        f"limit is {limit}. Try again shortly.",
                        param=where,
                    )
            self._own[amount] = own
            ledger._add(self._key, amount, count)

    def give_back(self, amount: Amount, count: int) -> None:
        """Count ``count`` less."""
        with self._ledger._lock:
            if not self._closed:
                self._own[amount] -= count
                self._ledger._add(self._key, amount, -count)

    def close(self) -> None:
        """Give everything back. May be called twice."""
        with self._ledger._lock:
            if self._closed:
                return
            self._closed = True
            for amount, count in self._own.items():
                if count:
                    self._ledger._add(self._key, amount, -count)
