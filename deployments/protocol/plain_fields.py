"""The fields of plain objects within bodies, whose values others check: unknown ones are logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.unknown_fields import log_unknown
from engine.inputs.pages import DOCUMENT_OPTIONS
from engine.inputs.video import VIDEO_OPTIONS


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields of an object, or of each object of a list.

    Attributes:
        known: names that are read, refused, or change no answer.
        parts: the shapes of fields that hold objects themselves.
    """

    known: frozenset[str]
    parts: Mapping[str, Shape] = field(default_factory=dict)


def log_unknown_within(body: str, value: Any, shape: Shape, where: str) -> None:
    """Log the unknown fields of plain data.

    Args:
        body: the kind of request.
        where: the field that holds ``value``, such as ``messages``.
    """
    if isinstance(value, list):
        for entry in value:
            log_unknown_within(body, entry, shape, f"{where}[]")
    elif isinstance(value, Mapping):
        log_unknown(body, value, shape.known, f"{where}.")
        for name in value.keys() & shape.parts.keys():
            log_unknown_within(body, value[name], shape.parts[name], f"{where}.{name}")


def _shape(*names: str, **parts: Shape) -> Shape:
    return Shape(frozenset({*names, *parts}), parts)


#: What a part may say of its image, video or document.
_MEDIA = ("detail", "timestamps", *VIDEO_OPTIONS, *DOCUMENT_OPTIONS)
#: ``format`` is a media type, which is read off the content.
_ADDRESS = _shape("url", "format", *_MEDIA)
_FILE = ("file_data", "file_url", "file_id", "filename")
_ROWS = _shape("image_embeds", "image_grid_thw", "image_size_list")

#: Every prompt is cached, and models are shown neither citations nor log-probabilities.
_NOTES = ("cache_control", "prompt_cache_breakpoint", "annotations", "logprobs")

#: A part of a message, of any kind.
PART = _shape(
    "type",
    "refusal",
    "uuid",
    "source",
    *_FILE,
    *_MEDIA,
    *_NOTES,
    url=_ADDRESS,
    image=_ADDRESS,
    image_url=_ADDRESS,
    video=_ADDRESS,
    video_url=_ADDRESS,
    document=_ADDRESS,
    document_url=_ADDRESS,
    image_embeds=_ROWS,
    file=_shape(*_FILE, *_MEDIA),
)

_CALLED = _shape("name", "arguments")

#: A message of a chat. Calls that a client put together from a stream have an index.
MESSAGE = _shape(
    "role",
    "name",
    "prefix",
    "tool_call_id",
    "reasoning",
    "reasoning_content",
    "refusal",
    "audio",
    *_NOTES,
    content=PART,
    function_call=_CALLED,
    tool_calls=_shape("id", "type", "index", function=_CALLED, custom=_shape("name", "input")),
)

FUNCTION = _shape("name", "description", "parameters", "strict", "input_examples")
CUSTOM = _shape("name", "description", format=_shape("type", grammar=_shape("syntax", "definition")))
TOOL = _shape("type", "cache_control", function=FUNCTION, custom=CUSTOM)

NAMED = _shape("name")
_ALLOWED = _shape("type", "name", function=NAMED, custom=NAMED)
TOOL_CHOICE = _shape(
    "type",
    "name",
    "mode",
    function=NAMED,
    custom=NAMED,
    tools=_ALLOWED,
    allowed_tools=_shape("mode", tools=_ALLOWED),
)

#: What a chat is made of, by field.
CHAT: Mapping[str, Shape] = {"messages": MESSAGE, "tools": TOOL}

#: An item of a response's input. Those that an earlier answer brought have fields that only describe it.
ITEM = _shape(
    "type",
    "role",
    "id",
    "status",
    "phase",
    "call_id",
    "name",
    "arguments",
    "input",
    "encrypted_content",
    "async",
    "caller",
    "namespace",
    "cache_control",
    content=PART,
    output=PART,
    summary=_shape("type", "text"),
)

#: A part of an input or a question of a decision.
_DECIDED = _shape(*PART.known, "data", **PART.parts)

#: What a decision is about.
DECISION: Mapping[str, Shape] = {
    "input": _shape(*ITEM.known, **{**ITEM.parts, "content": _DECIDED, "output": _DECIDED}),
    "questions": _shape(
        "type",
        "name",
        instructions=_DECIDED,
        choices=_shape("value", "description"),
        levels=_shape("label", "description"),
    ),
}

#: A query or a document that is scored.
SCORED = _shape("text", "image", image_url=_ADDRESS, content=PART, multi_modal=PART)
