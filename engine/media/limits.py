"""Limits on the bytes of media."""

from __future__ import annotations

from engine.errors import MediaTooLarge
from engine.media.guard import FetchPolicy
from engine.media.ledger import Account
from engine.media.source import MediaSource


class ByteBudget:
    """The bytes that all items of a request may have together.

    Args:
        limit: the most.
        account: of the request, where all bytes are charged as well; None if there is none.
    """

    def __init__(self, limit: int, account: Account | None = None) -> None:
        self._limit = limit
        self._account = account
        self._taken = 0

    def take(self, count: int, where: str) -> None:
        """Count ``count`` more bytes.

        Raises:
            MediaTooLarge: the limit is passed.
            Overloaded: other requests hold too many bytes.
        """
        self._taken += count
        if self._taken > self._limit:
            raise MediaTooLarge(
                f"{where}: the media of this request have more than {self._limit} bytes together.",
                param=where,
            )
        if self._account is not None:
            self._account.charge("bytes", count, where)

    def give_back(self, count: int) -> None:
        """Count ``count`` bytes less: they will be fetched again."""
        self._taken -= count
        if self._account is not None:
            self._account.give_back("bytes", count)


def check_size(count: int, policy: FetchPolicy, source: MediaSource) -> None:
    """Refuse an item of ``count`` bytes.

    Raises:
        MediaTooLarge: the policy allows fewer.
    """
    limit = policy.byte_limit(source.kind)
    if count > limit:
        raise MediaTooLarge(
            f"{source.where}: the {source.kind} has more than {limit} bytes.", param=source.where
        )
