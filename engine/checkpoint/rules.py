"""What the tensors of a family's checkpoints are called, and which part of the model they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.errors import CheckpointError

ModelPart = Literal["language", "vision"]


DECODER_RULES: tuple[tuple[str, str], ...] = (
    (r"(?:model\.|language_model\.)?lm_head\.(.*)", r"lm_head.\1"),
    (r"(?:model\.language_model|language_model\.model|model\.text_model|model)\.(.*)", r"\1"),
)
"""Names of a language model: alone, inside a VLM as saved today, and inside one as saved before."""

ROTARY_BUFFERS = r".*rotary_emb\.inv_freq"
TIED_HEAD = r".*lm_head\.weight"


@dataclass(frozen=True, slots=True)
class WeightRules:
    """Rename rules. Each is a regular expression for a whole tensor name and the name in the part's module
    (with ``\\1`` groups); the first that matches wins, ``ignore`` before ``vision`` before ``language``.

    Attributes:
        ignore: names that may be present and are not wanted, e.g. rotary buffers or a tied ``lm_head``.
    """

    language: tuple[tuple[str, str], ...] = DECODER_RULES
    vision: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    def assign(self, names: Iterable[str]) -> dict[ModelPart, dict[str, str]]:
        """Sort checkpoint names into parts: module name to checkpoint name.

        Raises:
            CheckpointError: names that no rule knows, or two names for one tensor.
        """
        parts: dict[ModelPart, dict[str, str]] = {"language": {}, "vision": {}}
        unknown = []
        for name in names:
            if any(re.fullmatch(pattern, name) for pattern in self.ignore):
                continue
            place = self._place(name)
            if place is None:
                unknown.append(name)
                continue
            part, internal = place
            if internal in parts[part]:
                raise CheckpointError(f"tensors {parts[part][internal]} and {name} are the same weight")
            parts[part][internal] = name
        if unknown:
            raise CheckpointError(f"tensors that this model doesn't have: {listing(unknown)}")
        return parts

    def _place(self, name: str) -> tuple[ModelPart, str] | None:
        tables: tuple[tuple[ModelPart, tuple[tuple[str, str], ...]], ...] = (
            ("vision", self.vision),
            ("language", self.language),
        )
        for part, table in tables:
            for pattern, replacement in table:
                match = re.fullmatch(pattern, name)
                if match:
                    return part, match.expand(replacement)
        return None


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
