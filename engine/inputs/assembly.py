"""Puts the expanded placeholders of media among token ids, and finds those that stand there already."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from engine.errors import InvalidRequest
from engine.inputs.placeholders import Placeholders
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun

#: Gives the token runs of an item that is the n-th of its kind in a request, from 0.
Expand = Callable[[MediaItem, int], tuple[PlaceholderRun, ...]]


#: Start and length of an item in token ids, and its index.
Place = tuple[int, int, int]
#: Whether the expanded placeholder of the n-th item of a kind, from 0, can have a start and a length.
Fits = Callable[[int, int, int], bool]


class PromptAssembly:
    """Token ids and media spans of a prompt that grows from left to right.

    Args:
        items: the media of the request.
        expand: gives an item's token runs.
    """

    def __init__(self, items: Sequence[MediaItem], expand: Expand) -> None:
        self.ids: list[int] = []
        self.spans: list[MediaSpan] = []
        self._items = items
        self._expand = expand
        before: Counter[str] = Counter()
        # How many items of its kind stand before each one.
        self._numbers: list[int] = []
        for item in items:
            self._numbers.append(before[item.kind])
            before[item.kind] += 1

    def add_ids(self, ids: Iterable[int]) -> None:
        self.ids += ids

    def add_item(self, index: int) -> None:
        """Append the expanded placeholder of ``items[index]``."""
        item, runs = self._items[index], self.runs(index)
        offset = len(self.ids)
        for run in runs:
            self.ids += [run.token_id] * run.count
        embed_index = None
        if not all(run.is_embed for run in runs):
            mask = np.repeat([run.is_embed for run in runs], [run.count for run in runs])
            embed_index = np.flatnonzero(mask).astype(np.int32)
        self.spans.append(MediaSpan(item, offset, len(self.ids) - offset, embed_index))

    def runs(self, index: int) -> tuple[PlaceholderRun, ...]:
        """The expanded placeholder of ``items[index]``."""
        return self._expand(self._items[index], self._numbers[index])


def match_items(
    found: Sequence[tuple[str, int | None]],
    items: Sequence[MediaItem],
    placeholders: Placeholders,
    param: str,
) -> list[int]:
    """The index of the item that each placeholder stands for.

    Args:
        found: kind of each placeholder, and its number from 1 where the family numbers them.
        param: the field of the request to name in errors.

    Raises:
        InvalidRequest: some item has no placeholder, or some placeholder no item.
    """
    if not found and not items:
        return []
    of_kind = {
        kind: [i for i, item in enumerate(items) if item.kind == kind]
        for kind in {item.kind for item in items} | {kind for kind, _ in found}
    }
    counts = dict.fromkeys(of_kind, 0)
    indices = []
    for kind, number in found:
        counts[kind] += 1
        place = (counts[kind] if number is None else number) - 1
        if 0 <= place < len(of_kind[kind]):
            indices.append(of_kind[kind][place])
    if len(indices) == len(found) and sorted(set(indices)) == list(range(len(items))):
        return indices
    kind = next((k for k in of_kind if counts[k] != len(of_kind[k])), next(iter(of_kind)))
    raise _mismatch(kind, counts[kind], len(of_kind[kind]), placeholders, param)


def assemble_ids(
    ids: Sequence[int],
    items: Sequence[MediaItem],
    placeholders: Placeholders,
    expand: Expand,
    param: str,
    is_video: Callable[[MediaItem, int], bool],
    around: Callable[[MediaItem], tuple[list[int], list[int]]],
) -> PromptAssembly:
    """A tokenised prompt in which each item is a placeholder token or its whole expanded placeholder.

    The ids of an earlier prompt, its answer and a new turn may be given together: the first items of a kind
    may be expanded and the later ones not, and a placeholder token that no item needs is an ordinary token.
    Videos are found first: a family may spell a video's frame as an image in one crop.

    Args:
        is_video: whether a video's expanded placeholder at an index is that, and not an image's of the same
            ids.
        around: gives the ids before and behind an item that stands as its placeholder token.

    Raises:
        InvalidRequest: some item has no place in the ids.
    """
    assembly = PromptAssembly(items, expand)
    expanded = [
        [token for run in assembly.runs(index) for token in [run.token_id] * run.count]
        for index in range(len(items))
    ]
    places: list[Place] = []
    for kind in sorted({item.kind for item in items}, key="video".__ne__):
        taken = sorted(places)
        indices = [index for index, item in enumerate(items) if item.kind == kind]
        of_kind = [items[index] for index in indices]

        def free(number: int, start: int, length: int, taken: Sequence[Place] = taken) -> bool:
            # Those taken stand apart, so only the last one that begins before the end can overlap.
            before = bisect_right(taken, start + length - 1, key=lambda place: place[0])
            return not before or sum(taken[before - 1][:2]) <= start

        def own(
            number: int, start: int, length: int, free: Fits = free, of_kind: Sequence[MediaItem] = of_kind
        ) -> bool:
            item = of_kind[number]
            return free(number, start, length) and (item.kind != "video" or is_video(item, start))

        spelled, pad = [expanded[index] for index in indices], placeholders.ids.get(kind)
        found = _find_numbered(ids, spelled) if placeholders.numbered else None
        found = found or _find_in_order(ids, spelled, pad, own)
        if len(found) < len(indices):
            # Ids of another's making may lack what comes before a video.
            found = _find_in_order(ids, spelled, pad, free)
        if len(found) < len(indices):
            pads = _pads(ids, pad, _end(found))
            raise _mismatch(kind, len(found) + len(pads), len(indices), placeholders, param)
        places += ((start, length, index) for (start, length), index in zip(found, indices, strict=True))
    places.sort()
    end = 0
    for start, length, index in places:
        if start < end:
            raise _mismatch(items[index].kind, 0, 1, placeholders, param)
        alone = length < len(expanded[index])
        before, behind = around(items[index]) if alone else ([], [])
        assembly.add_ids([*ids[end:start], *before])
        assembly.add_item(index)
        assembly.add_ids(behind)
        end = start + length
    assembly.add_ids(ids[end:])
    return assembly


def _find_in_order(
    ids: Sequence[int], spelled: Sequence[list[int]], pad: int | None, fits: Fits
) -> list[tuple[int, int]]:
    """Start and length of each item of a kind in ``ids``, in order; fewer than items if they don't all fit.

    Args:
        spelled: the items' expanded placeholders.
        pad: the placeholder token of the kind; None if it has none.
        fits: whether the expanded placeholder of an item of the kind can have a start and a length.
    """
    whole: list[tuple[int, int]] = []
    for number, wanted in enumerate(spelled):
        start = _find(ids, wanted, _end(whole), partial(fits, number))
        if start is None:
            break
        whole.append((start, len(wanted)))
    missing = len(spelled) - len(whole)
    if not missing or pad is None:
        return whole
    pads = _pads(ids, pad, 0)
    # An expanded placeholder may hold the token, too.
    within = sum(bisect_left(pads, start + length) - bisect_left(pads, start) for start, length in whole)
    if len(pads) == len(spelled) and (not whole or len(pads) - within != missing):
        return [(place, 1) for place in pads]
    if not whole or (pads and pads[0] < whole[0][0]):
        return whole
    pads = [place for place in pads if place >= _end(whole)]
    if len(pads) != missing:
        # An answer comes before the turn that adds media, so the last placeholder tokens are the media's.
        # Several in a row come from an answer.
        alone = [place for place in pads if pad not in (*ids[place - 1 : place], *ids[place + 1 : place + 2])]
        pads = alone[-missing:]
    return [*whole, *((place, 1) for place in pads)] if len(pads) == missing else whole


def _find_numbered(ids: Sequence[int], spelled: Sequence[list[int]]) -> list[tuple[int, int]] | None:
    """Start and length of each expanded placeholder, in whatever order they stand; None if one is missing.

    Where several fit, the one that ends where the run of its last token ends is meant, then the first.
    """
    places: dict[int, tuple[int, int]] = {}
    position = 0
    # Most items of a request are spelled alike. Of those the first one left is meant.
    alike: dict[tuple[int, ...], deque[int]] = {}
    for index, wanted in enumerate(spelled):
        alike.setdefault(tuple(wanted), deque()).append(index)
    first = {wanted[0] for wanted in spelled}
    while position < len(ids) and len(places) < len(spelled):
        fitting = []
        if ids[position] in first:
            for tokens, left in alike.items():
                end = position + len(tokens)
                if end <= len(ids) and ids[end - 1] == tokens[-1] and tuple(ids[position:end]) == tokens:
                    fitting.append((list(ids[end : end + 1]) == [tokens[-1]], left[0], tokens))
        if fitting:
            _, index, tokens = min(fitting)
            places[index] = position, len(tokens)
            position += len(tokens)
            alike[tokens].popleft()
            if not alike[tokens]:
                del alike[tokens]
        else:
            position += 1
    return [places[index] for index in range(len(spelled))] if len(places) == len(spelled) else None


def _pads(ids: Sequence[int], pad: int | None, start: int) -> list[int]:
    """Indices of the token ``pad`` in ``ids`` from ``start`` on."""
    return [place for place in range(start, len(ids)) if ids[place] == pad]


def _end(places: Sequence[tuple[int, int]]) -> int:
    return sum(places[-1]) if places else 0


def _find(ids: Sequence[int], wanted: list[int], start: int, fits: Callable[[int, int], bool]) -> int | None:
    """Index at or after ``start`` from which on ``ids`` reads ``wanted``, and where that ``fits``."""
    return next((found for found in _occurrences(ids, wanted, start) if fits(found, len(wanted))), None)


def _occurrences(ids: Sequence[int], wanted: list[int], start: int) -> Iterator[int]:
    """The indices at or after ``start`` from which on ``ids`` reads ``wanted``.

    Placeholders repeat one token, so that to compare at each index would take square time. This is the
    algorithm of Knuth, Morris and Pratt.
    """
    # How many tokens at the beginning of ``wanted`` are also the last ones before each index, but not all.
    borders = [0] * (len(wanted) + 1)
    for index in range(1, len(wanted)):
        matched = borders[index]
        while matched and wanted[index] != wanted[matched]:
            matched = borders[matched]
        borders[index + 1] = matched + (wanted[index] == wanted[matched])
    matched = 0
    for index in range(start, len(ids)):
        while matched and ids[index] != wanted[matched]:
            matched = borders[matched]
        matched += ids[index] == wanted[matched]
        if matched == len(wanted):
            yield index + 1 - matched
            matched = borders[matched]


def _mismatch(kind: str, found: int, given: int, placeholders: Placeholders, param: str) -> InvalidRequest:
    text = placeholders.text(kind, 1)
    hint = f"In a raw prompt {text!r} stands for each." if text else f"This model takes no {kind}."
    return InvalidRequest(
        f"The number of {kind} placeholders in the prompt is {found}, but the number of {kind}s given is "
        f"{given}. {hint}",
        param=param,
    )
