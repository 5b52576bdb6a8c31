"""Media that later requests name by the ``uuid`` of the part that brought them."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pydantic import NonNegativeInt, PositiveFloat

from engine.errors import InvalidRequest, SightlineError
from engine.media.source import MediaSource
from engine.prompt import KeptFiles
from engine.settings import Settings


class UnknownReference(SightlineError):
    """No media of this ``uuid`` are kept for the caller."""

    status = 404
    code = "media_not_cached"


class ReferenceConflict(SightlineError):
    """A ``uuid`` came with other content than before."""

    status = 409
    code = "media_uuid_conflict"


class ReferenceConfig(Settings):
    """The media that are kept for later requests, for all models and all ingress replicas together.

    Attributes:
        max_bytes: most bytes of encoded files, over all callers; 0 keeps none. The files of the key that
            holds most go first, least recently used ones before others.
        max_items: most items likewise.
        seconds: how long after its last use an item is kept.
    """

    max_bytes: NonNegativeInt = 256 << 20
    max_items: NonNegativeInt = 16384
    seconds: PositiveFloat = 3600.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The only caller that may use an item: it must not be enough to guess a ``uuid``.

    Attributes:
        key: name of the API key, also where its cache is shared with others.
        salt: the request's ``cache_salt``, which keeps apart the tenants behind one key.
        model: name of the model that the caller asks.
    """

    key: str
    salt: str
    model: str = ""


@dataclass(slots=True)
class _Entry:
    """``form`` is the source without its payload, ``used`` when it was last used."""

    form: MediaSource
    kept: KeptFiles
    used: float


_Name = tuple[str, str, str]


class MediaKeeper(Protocol):
    """The place where media are kept by ``uuid``: :class:`References`, here or in another process.

    Each method may raise a SightlineError if that process is lost.
    """

    async def resolve(
        self, owner: Owner, sources: Sequence[MediaSource]
    ) -> tuple[list[MediaSource], dict[int, KeptFiles]]:
        """The sources in the form of the media that they name, and the kept files by the source's index.

        Raises:
            UnknownReference: nothing is kept under a ``uuid``.
            InvalidRequest: a part asks for what the kept content can't give.
        """

    async def keep(self, owner: Owner, source: MediaSource, kept: KeptFiles) -> None:
        """Keep the files that ``source`` brought.

        Raises:
            ReferenceConflict: the ``uuid`` stands for other content.
        """

    async def lost(self, owner: Owner, named: Sequence[MediaSource]) -> None:
        """Forget the media that ``named`` name, because their files are lost.

        Raises:
            UnknownReference: always.
        """


class References:
    """A :class:`MediaKeeper` in this process. Used on the event loop alone.

    A ``uuid`` stands for one content as long as it is kept: to replace it would let an earlier conversation
    go on about another image.

    Args:
        config: the limits.
        clock: gives the time in seconds.
    """

    def __init__(self, config: ReferenceConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        #: By key; of each the least recently used item first.
        self._keys: dict[str, OrderedDict[_Name, _Entry]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all kept files."""
        return sum(self._bytes.values())

    async def resolve(
        self, owner: Owner, sources: Sequence[MediaSource]
    ) -> tuple[list[MediaSource], dict[int, KeptFiles]]:
        found: dict[int, KeptFiles] = {}
        resolved = []
        for source in sources:
            if source.is_reference:
                entry = self._find(owner, source.uuid)
                if entry is None or entry.form.kind != source.kind:
                    raise self._unknown(source)
                found[source.index] = entry.kept
                source = _in_form(source, entry.form)
            resolved.append(source)
        return resolved, found

    async def keep(self, owner: Owner, source: MediaSource, kept: KeptFiles) -> None:
        known = self._find(owner, source.uuid)
        if known is not None:
            if (known.kept.digest, known.form.kind) != (kept.digest, source.kind):
                raise ReferenceConflict(
                    f"{source.where}: the uuid {source.uuid[:64]!r} stands for other content here; send this "
                    "one under another uuid.",
                    param=source.where,
                )
            return
        if kept.size > self._config.max_bytes:
            return
        entries = self._keys.setdefault(owner.key, OrderedDict())
        entries[_name(owner, source.uuid)] = _Entry(without_payload(source), kept, self._clock())
        self._bytes[owner.key] = self._bytes.get(owner.key, 0) + kept.size
        self._make_room()

    async def lost(self, owner: Owner, named: Sequence[MediaSource]) -> None:
        for source in named:
            self._drop(owner.key, _name(owner, source.uuid))
        raise self._unknown(named[0])

    def _find(self, owner: Owner, uuid: str) -> _Entry | None:
        self._expire(owner.key)
        entries, name = self._keys.get(owner.key), _name(owner, uuid)
        if entries is None or name not in entries:
            return None
        entries.move_to_end(name)
        entries[name].used = self._clock()
        return entries[name]

    def _expire(self, key: str) -> None:
        oldest_use = self._clock() - self._config.seconds
        while (entries := self._keys.get(key)) is not None:
            name, entry = next(iter(entries.items()))
            if entry.used > oldest_use:
                return
            self._drop(key, name)

    def _make_room(self) -> None:
        config = self._config
        while self.held_bytes > config.max_bytes:
            self._drop_oldest(max(self._bytes, key=self._bytes.__getitem__))
        while sum(map(len, self._keys.values())) > config.max_items:
            self._drop_oldest(max(self._keys, key=lambda key: len(self._keys[key])))

    def _drop_oldest(self, key: str) -> None:
        self._drop(key, next(iter(self._keys[key])))

    def _drop(self, key: str, name: _Name) -> None:
        entries = self._keys.get(key, OrderedDict())
        entry = entries.pop(name, None)
        if entry is None:
            return
        self._bytes[key] -= entry.kept.size
        if not entries:
            del self._keys[key], self._bytes[key]

    def _unknown(self, source: MediaSource) -> UnknownReference:
        advice = "send the content itself beside the uuid once more"
        if not (self._config.max_bytes and self._config.max_items):
            advice = "this server keeps no media; send the content itself"
        return UnknownReference(
            f"{source.where}: no {source.kind} of the uuid {source.uuid[:64]!r} is kept here for this "
            f"caller; {advice}.",
            param=source.where,
        )


def _name(owner: Owner, uuid: str) -> _Name:
    return owner.model, owner.salt, uuid


def without_payload(source: MediaSource) -> MediaSource:
    """``source`` without the media that it brought."""
    frames = tuple(replace(frame, url=None, data=None, image=None) for frame in source.frames)
    rows = None if source.rows is None else replace(source.rows, payload="")
    return replace(source, url=None, data=None, image=None, frames=frames, rows=rows, options={})


def _in_form(source: MediaSource, form: MediaSource) -> MediaSource:
    """A reference with the form of what it names. Frames keep the times of their list if it states none.

    Raises:
        InvalidRequest: it states times for another number of frames, or for a file.
    """
    asked = source.video
    if form.frames and not asked.is_set:
        asked = form.video
    unfit = asked.times and len(asked.times) != len(form.frames)
    if unfit or (form.frames and asked.num_frames is not None):
        raise InvalidRequest(
            f"{source.where}: the kept video has {len(form.frames) or 'no list of'} frames, which timestamps "
            "or num_frames of this part don't fit.",
            param=source.where,
        )
    return replace(source, frames=form.frames, rows=form.rows, video=asked)
