"""Threads that prepare media."""

from __future__ import annotations

import numpy as np
import pytest

from engine.families.internvl.processor import InternVLProcessor
from engine.media import resize
from engine.media.crew import Crew
from engine.media.source import MediaSource
from engine.preparation import MediaPreparation
from tests.engine.tiny import picture

PROCESSOR = InternVLProcessor(side=16, rows=4, image_token_id=7)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_large_item_takes_the_threads_that_are_free(monkeypatch, kind):
    monkeypatch.setattr(resize, "_SHARE", 1)
    taken, share = set(), Crew.share

    def counted(self, work, most):
        def seen(part, parts):
            taken.add(parts)
            work(part, parts)

        share(self, seen, most)

    monkeypatch.setattr(Crew, "share", counted)
    source, image = MediaSource(0, kind), picture(60, 44)
    alone, several = MediaPreparation(PROCESSOR), MediaPreparation(PROCESSOR, threads=3)
    try:
        expected = alone.show(PROCESSOR, source, [image])
        assert max(taken) == 1
        found = several.show(PROCESSOR, source, [image])
        assert max(taken) == 3 and found.item == expected.item
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        taken.clear()
        several.limit_threads(2)
        several.show(PROCESSOR, source, [image])
        assert max(taken) == 2
    finally:
        alone.close()
        several.close()
