"""Reads one tool call written as a JSON object, whose arguments are passed on while they arrive."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from engine.parsers.events import CallArguments, CallStart, Event, whole_characters

_SPACE = " \t\r\n"


class MalformedCall(ValueError):
    """The text is not a tool call."""


class JsonValue:
    """Finds the end of one JSON value that arrives in pieces. Checks brackets and quotes only."""

    def __init__(self) -> None:
        self._begun = False
        self._closers: list[str] = []
        self._in_string = self._escaped = False

    def feed(self, text: str, start: int) -> tuple[int, Literal["more", "ended", "broken"]]:
        """Read on from ``text[start]``.

        Returns:
            The index after the last character that belongs to the value, and whether the value goes on, has
            ended, or can't be completed because a bracket doesn't match.
        """
        for index in range(start, len(text)):
            character = text[index]
            if self._in_string:
                if self._end_of_string(character) and not self._closers:
                    return index + 1, "ended"
            elif not self._begun or (self._closers and character in '{["'):
                self._begun = True
                self._open(character)
            elif not self._closers:
                # A number or a name ends before the character that follows it.
                if character in ",}]" or character in _SPACE:
                    return index, "ended"
            elif character in "}]":
                if self._closers[-1] != character:
                    return index, "broken"
                self._closers.pop()
                if not self._closers:
                    return index + 1, "ended"
        return len(text), "more"

    def _end_of_string(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        return not self._in_string

    def _open(self, character: str) -> None:
        if character == "{":
            self._closers.append("}")
        elif character == "[":
            self._closers.append("]")
        elif character == '"':
            self._in_string = True


class JsonCall:
    """Reads ``{"name": ..., "arguments": {...}}`` from pieces, with its keys in either order.

    Args:
        argument_keys: names that the arguments may have.
        skipped_keys: names of other fields that a call may have, such as ``id``.
        name_key: the name of the function's name.

    Attributes:
        name: the function's name once it is known.
        done: whether the object has ended.
        broken: the text stopped being a call after its name was known.
    """

    def __init__(
        self,
        argument_keys: Collection[str] = ("arguments", "parameters"),
        skipped_keys: Collection[str] = ("id", "type"),
        name_key: str = "name",
    ) -> None:
        self.name: str | None = None
        self.done = self.broken = False
        self._argument_keys, self._skipped_keys = argument_keys, skipped_keys
        self._name_key = name_key
        self._state = "open"
        self._key = ""
        self._raw: list[str] = []
        self._value = JsonValue()
        self._waiting: list[str] = []
        self._has_arguments = False

    def feed(self, text: str) -> tuple[str, str]:
        """Read a piece of the object.

        Returns:
            The arguments' text that may be passed on (only after ``name`` is set), and the text that doesn't
            belong to the call: what follows the object's end, or the place where the call is broken.

        Raises:
            MalformedCall: the text is no call, and ``name`` isn't known yet.
        """
        index = 0
        while index < len(text) and not (self.done or self.broken):
            try:
                index = self._read(text, index)
            except MalformedCall:
                if self.name is None:
                    raise
                self.broken = True
        return self._passed_on(), text[index:]

    def _read(self, text: str, index: int) -> int:
        character = text[index]
        if self._state == "value":
            return self._read_value(text, index)
        if self._state == "key":
            end, state = self._value.feed(text, index)
            self._raw.append(text[index:end])
            if state == "ended":
                self._end_key()
            return end
        if character in _SPACE:
            return index + 1
        return self._punctuation(character, index)

    def _punctuation(self, character: str, index: int) -> int:
        if self._state == "open" and character == "{":
            self._state = "first"
        elif self._state in ("first", "more") and character == '"':
            self._begin("key")
            return index
        elif self._state in ("first", "next") and character == "}":
            self._end_object()
        elif self._state == "next" and character == ",":
            self._state = "more"
        elif self._state == "colon" and character == ":":
            self._state = "before value"
        elif self._state == "before value":
            self._begin("value")
            return index
        else:
            raise MalformedCall(f"unexpected {character!r}")
        return index + 1

    def _begin(self, state: str) -> None:
        self._state, self._value, self._raw = state, JsonValue(), []

    def _end_key(self) -> None:
        self._key = _decoded(self._raw)
        if self._key != self._name_key and self._key not in (*self._argument_keys, *self._skipped_keys):
            raise MalformedCall(f"a call has no field {self._key!r}")
        self._state = "colon"

    def _read_value(self, text: str, index: int) -> int:
        end, state = self._value.feed(text, index)
        piece = text[index:end]
        is_object = self._raw[:1] == ["{"] or (not self._raw and piece.startswith("{"))
        if self._key in self._argument_keys and is_object:
            self._waiting.append(piece)
            self._raw = ["{"]
            self._has_arguments = True
        else:
            self._raw.append(piece)
        if state == "ended":
            self._end_value(is_object)
        elif state == "broken":
            # The caller continues behind what was read, which is passed on already.
            self._state = "broken"
        return end

    def _end_value(self, is_object: bool) -> None:
        self._state = "next"
        if self._key == self._name_key:
            name = _decoded(self._raw)
            if not isinstance(name, str) or not name:
                raise MalformedCall("the name of a call is a string")
            self.name = name
        elif self._key in self._argument_keys and not is_object:
            self._waiting.append(_arguments_object(_decoded(self._raw)))
            self._has_arguments = True

    def _end_object(self) -> None:
        if self.name is None:
            raise MalformedCall("a call has a name")
        if not self._has_arguments:
            self._waiting.append("{}")
        self.done = True

    def _passed_on(self) -> str:
        if self.name is None:
            return ""
        text = "".join(self._waiting)
        self._waiting = []
        return text


class HeldCall:
    """Reads a :class:`JsonCall` from a buffer that is held until the name is known: the text may be no call.
    Afterwards the buffer keeps what :meth:`read` gives back.

    Args:
        call: of which nothing was read.

    Attributes:
        call: as far as it was read.
    """

    def __init__(self, call: JsonCall) -> None:
        self.call = call
        self._consumed = 0

    def read(self, buffer: str, start: int, index: int, events: list[Event]) -> str | None:
        """Read on in the buffer, and report what is new of the call: its name, and text of its arguments.

        Args:
            start: where the call begins, or goes on once its name is known.
            index: number of the call in the answer.
            events: what is new is appended to it.

        Returns:
            What the buffer holds behind that; None while the name isn't known.

        Raises:
            MalformedCall: as :meth:`JsonCall.feed`.
        """
        was_named = self.call.name is not None
        arguments, rest = self.call.feed(buffer[max(start, self._consumed) :])
        if self.call.name is None:
            self._consumed = len(buffer)
            return None
        self._consumed = 0
        if not was_named:
            events.append(CallStart(index, self.call.name))
        if arguments:
            events.append(CallArguments(index, arguments))
        return rest


def _decoded(raw: list[str]) -> Any:
    try:
        value = json.loads("".join(raw))
    except ValueError as error:
        raise MalformedCall(str(error)) from error
    return whole_characters(value) if isinstance(value, str) else value


def _arguments_object(value: object) -> str:
    """Arguments that are not an object: null, or an object written as a JSON string."""
    if value is None:
        return "{}"
    if isinstance(value, str):
        try:
            if isinstance(json.loads(value), dict):
                return value
        except ValueError:
            pass
    raise MalformedCall("the arguments of a call are an object")
