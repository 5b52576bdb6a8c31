"""The parts of a request: token ids, and media items with their places among them.

These types are plain data. They cross process boundaries, so they hold no tensors unless stated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import numpy as np

#: A raw prompt: a text, its token ids, or a dict with either.
Prompt = str | Sequence[int] | Mapping[str, Any]


def is_token_ids(value: Any) -> TypeGuard[Sequence[int]]:
    """Return whether ``value`` is a list of token ids, rather than of prompts."""
    return isinstance(value, list | tuple) and bool(value) and all(type(each) is int for each in value)


@dataclass(frozen=True, slots=True)
class PlaceholderRun:
    """``count`` copies of ``token_id``. Embedding rows overwrite ``is_embed`` runs; others are text."""

    token_id: int
    count: int
    is_embed: bool


def runs_with_rows(
    tokens: Iterable[int], row_token: int | None, counts: Iterator[int]
) -> tuple[PlaceholderRun, ...]:
    """The tokens of an item as runs: each ``row_token`` stands for as many embedding rows as the next of
    ``counts`` says."""
    return tuple(
        PlaceholderRun(token, next(counts), True) if token == row_token else PlaceholderRun(token, 1, False)
        for token in tokens
    )


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One prepared image or video, without its pixels: small enough to pass around freely.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        hash: hex content hash, see :mod:`engine.media.keys`.
        num_tokens: embedding rows that the encoder yields for it.
        grid: the family's own shape of the item, e.g. Qwen2-VL's ``(t, h, w)`` in patches.
        size: ``(width, height)`` of the image that the model's processor got, in pixels.
        placeholder: the token runs that stand for it in a prompt; their ``is_embed`` counts sum to
            ``num_tokens``. Derived from the same processor result as ``num_tokens``.
        times: the time in seconds of each step of ``grid`` in time, for families whose models get it; of
            families whose models get it too, the video's duration is the last, or all that there is.
    """

    kind: str
    hash: str
    num_tokens: int
    grid: tuple[int, ...]
    size: tuple[int, int]
    placeholder: tuple[PlaceholderRun, ...]
    times: tuple[float, ...] = ()

    @classmethod
    def of_rows(
        cls,
        kind: str,
        key: str,
        token_id: int,
        num_tokens: int,
        *,
        grid: tuple[int, ...],
        size: tuple[int, int],
        times: tuple[float, ...] = (),
    ) -> MediaItem:
        """An item with the content hash ``key``, whose placeholder is ``token_id`` ``num_tokens`` times."""
        placeholder = (PlaceholderRun(token_id, num_tokens, True),)
        return cls(kind, key, num_tokens, grid, size, placeholder, times)

    def __post_init__(self) -> None:
        rows = sum(run.count for run in self.placeholder if run.is_embed)
        assert rows == self.num_tokens, f"{rows} placeholder rows for {self.num_tokens} embedding rows"


@dataclass(frozen=True, slots=True)
class PagesItem:
    """The pages of a document, or the frames of an image, in place of one part of a message.

    Attributes:
        pages: their images.
        texts: the text that follows each of them; empty if there are none.
    """

    pages: tuple[MediaItem, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedMedia:
    """A media item with the encoder's input.

    Attributes:
        item: the description.
        pixels: family-defined array; uint8 ``(H, W, 3)`` or ``(N, H, W, 3)`` wherever normalisation can be
            left to the encoder, float32 otherwise. Of an item that came as embedding rows, these rows.
        seconds: duration of the steps that made it, by name; for reports.
        frames: frames of a video that the model is shown; 1 for an image.
        rows: the dtype of the embedding rows in ``pixels`` if the item came as such, as in
            :class:`EmbeddedMedia`; else None.
        kept: the files that it was made of, if its source has a ``uuid`` and brought them.
        note: what is missing of it, in words; empty if nothing is.
    """

    item: MediaItem
    pixels: np.ndarray
    seconds: Mapping[str, float] = field(default_factory=dict)
    frames: int = 1
    rows: str | None = None
    kept: KeptFiles | None = None
    note: str = ""

    @property
    def embedded(self) -> EmbeddedMedia | None:
        """The embedding rows that the caller gave; None if the encoder makes them."""
        return None if self.rows is None else EmbeddedMedia(self.item.hash, self.pixels, self.rows)


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """The encoded files of a media item, for later requests that name it by its ``uuid``.

    Attributes:
        files: a list of their bytes, or a reference to it.
        digest: hex hash of all files.
        size: bytes of all files.
    """

    files: Any
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """The place of an item in a prompt.

    Attributes:
        item: the media item.
        offset: index of the span's first token in the prompt.
        length: tokens in the span, non-embedding ones included.
        embed_index: sorted int32 positions ``(num_tokens,)`` *relative to offset* that take embedding rows;
            None when the whole span does.
    """

    item: MediaItem
    offset: int
    length: int
    embed_index: np.ndarray | None = None

    def rows_before(self, position: int) -> int:
        """Embedding rows of this span that lie before the absolute prompt ``position``."""
        relative = min(max(position - self.offset, 0), self.length)
        if self.embed_index is None:
            return relative
        return int(np.searchsorted(self.embed_index, relative))

    def runs(self) -> list[tuple[int, int]]:
        """The absolute ranges ``[start, end)`` of consecutive tokens that take embedding rows."""
        if self.embed_index is None:
            return [(self.offset, self.offset + self.length)]
        if not len(self.embed_index):
            return []
        parts = np.split(self.embed_index, np.flatnonzero(np.diff(self.embed_index) > 1) + 1)
        return [(self.offset + int(part[0]), self.offset + int(part[-1]) + 1) for part in parts]


@dataclass(frozen=True, slots=True)
class EngineInput:
    """A prompt ready for the engine: ids with every placeholder expanded, and the spans of its media."""

    token_ids: list[int]
    spans: list[MediaSpan] = field(default_factory=list)
    text: str | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message after validation.

    Attributes:
        role: who speaks.
        parts: texts and media in the order in which they were given.
        extra: further fields that chat templates print, such as ``tool_calls``.
        form: how the caller wrote the content: as a string, as a list of parts, or not at all.
    """

    role: str
    parts: list[TextPart | MediaPart]
    extra: dict[str, Any] = field(default_factory=dict)
    form: Literal["string", "parts", "absent"] = "string"


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A place in a message where the ``index``-th media item of the request stands."""

    index: int
    kind: str = "image"


@dataclass(frozen=True, slots=True)
class EmbeddedMedia:
    """The encoder's result for one item, as it travels between processes.

    Attributes:
        hash: the item's content hash.
        rows: ``(num_tokens, width)``; float32, float16, or the bits of bfloat16 as uint16.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        cached: the rows were computed for an earlier request; for reports.
    """

    hash: str
    rows: np.ndarray
    dtype: str
    cached: bool = False

    def kept(self) -> EmbeddedMedia:
        """These for several prompts."""
        return self
