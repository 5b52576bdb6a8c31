"""Arguments of a call that a model writes one by one between tags, as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.parsers.arguments import Argument, argument_as_json, arguments_of, others_of, part_as_json


class TaggedArguments:
    """The arguments of one call: texts for parameters that the schema calls strings, JSON for all others.

    Args:
        schema: JSON schema of the function's parameters.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._stated, self._others = arguments_of(schema), others_of(schema)
        self._keys: list[str] = []

    @property
    def stated(self) -> Mapping[str, Argument]:
        """The arguments that the schema names."""
        return self._stated

    def key(self, written: str) -> str:
        """Return the key that ``written`` means; white space around it counts only in keys of the schema."""
        return written if written in self._stated else written.strip()

    def entry(self, key: str, value: str) -> str:
        """Return the next entry of the JSON object; an empty text for a key that has come before."""
        if key in self._keys:
            return ""
        written = self._named(key, argument_as_json(self._schema, self._argument(key), value))
        self._keys.append(key)
        return written

    def part(self, key: str, value: str) -> str:
        """Return the beginning of an entry whose value was cut off; an empty text if it can't be shown."""
        shown = part_as_json(self._schema, self._argument(key), value)
        return self._named(key, shown) if shown and key not in self._keys else ""

    def _named(self, key: str, value: str) -> str:
        return f"{', ' if self._keys else ''}{json.dumps(key, ensure_ascii=False)}: {value}"

    def _argument(self, key: str) -> Argument:
        return self._stated.get(key) or Argument(self._others, False)
