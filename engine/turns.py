"""Turns of an encoder and a language model whose launches and steps go to one stream of a device.

While few images wait, launches come in pieces. A piece follows each step, so that no answer waits for more
than one of them between two tokens, and an image is done after as many steps as it has pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Seconds between two looks whether a piece is computed, if no step comes.
_LOOK_S = 0.0005


class Turns:
    """Says when a piece may be enqueued.

    Attributes:
        has_steps: the language model has something to compute.
        crowded: many images wait. They come in whole launches, and many prompts at a time with them.
    """

    def __init__(self) -> None:
        self.has_steps = self.crowded = False
        self._changed = threading.Condition()
        # Since the latest piece.
        self._stepped = False

    def stepped(self) -> None:
        """A step was enqueued."""
        with self._changed:
            self._stepped = True
            self._changed.notify()

    def await_step(self, computed: Callable[[], bool]) -> None:
        """Wait until a step is enqueued behind a piece of a launch; not for long if none comes.

        Args:
            computed: whether the device has computed the piece.
        """
        with self._changed:
            self._stepped = False
            while self.has_steps and not (self._stepped or computed()):
                self._changed.wait(_LOOK_S)
