"""A Jinja environment for templates that nobody has checked: sandboxed, and bounded in time and size."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)")


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Limits of one rendering: characters of output, loop turns plus calls, and seconds."""

    output: int = 8_000_000
    steps: int = 1_000_000
    seconds: float = 5.0


class LimitReached(Exception):
    """Carries the limit in words. No TemplateError, so that no template can be mistaken for it."""


class Meter:
    """Counts the work of one rendering, or several, against ``limits``; its time starts when it is made."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + limits.seconds
        self._steps = 0
        self._characters = 0

    def step(self) -> None:
        self._steps += 1
        if self._steps > self._limits.steps:
            raise LimitReached(f"{self._limits.steps} steps")
        if self._steps % 64 == 0 and time.monotonic() > self._deadline:
            raise LimitReached(f"{self._limits.seconds:g} seconds")

    def output(self, characters: int) -> None:
        self._characters += characters
        self.size(self._characters)
        self.step()

    def size(self, characters: int) -> None:
        if characters > self._limits.output:
            raise LimitReached(f"{self._limits.output} characters")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Transformers' template environment, in which every loop turn, call and long string is counted."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, limits: RenderLimits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._limits = limits
        self._active = threading.local()
        self.filters["tojson"] = _to_json
        self.filters["json_or_text"] = _json_or_text
        self.filters["_turns"] = self._turns
        self.filters["_sized"] = self._sized
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def metered(self, meter: Meter | None = None) -> _Metered:
        """A context in which this thread's rendering counts on ``meter``, or on one of its own."""
        return _Metered(self._active, meter or Meter(self._limits))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _CountEverything().visit(super()._parse(source, name, filename))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self._active.meter.step()
        return self._sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self._active.meter
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and isinstance(other, str | list | tuple):
                    meter.size(one * len(other))
        elif operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise LimitReached("an exponent of 64")
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise LimitReached("a field width of 999")
        return self._sized(super().call_binop(context, operator, left, right))

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        step = self._active.meter.step
        for value in values:
            step()
            yield value

    def _sized(self, value: Any) -> Any:
        if isinstance(value, str):
            self._active.meter.size(len(value))
        return value


class _Metered:
    """Makes a meter the running thread's, for one rendering."""

    def __init__(self, active: threading.local, meter: Meter) -> None:
        self._active = active
        self._meter = meter

    def __enter__(self) -> Meter:
        self._active.meter = self._meter
        return self._meter

    def __exit__(self, *_: object) -> None:
        del self._active.meter


class _CountEverything(NodeTransformer):
    """Sends loops through ``_turns`` and joined strings through ``_sized``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_turns", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_sized", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _json_or_text(text: str) -> Any:
    """The value of a JSON text, for the project's own templates; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
