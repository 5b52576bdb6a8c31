"""Finds out, by rendering probes, in which form a chat template takes message content from each role.

A template may want a string from one role and a list of parts from another, and nothing but rendering tells:
a loop over parts can hide behind macros, namespaces, indices or ``get``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.inputs.chat_template import ChatTemplate
from engine.inputs.placeholders import Placeholders
from engine.inputs.template_sandbox import Meter, RenderLimits
from engine.prompt import MediaPart, Message, TextPart

#: Bounds of all probes of one role together.
PROBE_LIMITS = RenderLimits(output=4_000_000, steps=200_000, seconds=5.0)
#: repr() and JSON double a backslash, so a printed list or a quoted string is not taken for the text itself.
_FIRST, _SECOND = "alpha\\one", "beta\\two"
_UNKNOWN_ROLE = "quixotic"
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {}},
    },
}
#: Nine characters: Mistral's templates refuse other lengths.
_CALL_ID = "probe0001"
_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": {}}}

#: Roles of the conversations in which a role is tried, the most usual conversation first. ``call`` is an
#: assistant's message that calls a tool, ``self`` the role in question.
_CONVERSATIONS: Mapping[str, Sequence[Sequence[str]]] = {
    "system": (("self", "user"), ("self", "user", "assistant"), ("self",)),
    "user": (("system", "self"), ("self",)),
    "assistant": (("user", "self"), ("user", "self", "user"), ("system", "user", "self")),
    "tool": (
        ("user", "call", "self"),
        ("user", "call", "self", "assistant"),
        ("system", "user", "call", "self"),
        ("user", "self"),
    ),
}

Form = Literal["string", "part", "parts", "absent"]


@dataclass(frozen=True, slots=True)
class RoleForms:
    """The forms in which a template prints the content of one role, with nothing lost and no Python syntax.

    Attributes:
        texts: ``string``: one string; ``part``: a list of one text part; ``parts``: a list of several text
            parts; ``absent``: no content, beside tool calls.
        media: by kind of media, the part that makes the template print its placeholder string.
    """

    texts: frozenset[str] = frozenset()
    media: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class ContentForms:
    """Gives a template each message in a form that it prints: the caller's own form wherever that works.

    If no form works, the caller's own is passed on, as Transformers would. Thread-safe; each role is probed
    once.

    Args:
        template: the chat template.
        placeholders: the placeholder strings of the model's family.
        separator: joins the parts of a message that must become one string.
    """

    def __init__(self, template: ChatTemplate, placeholders: Placeholders, separator: str = "") -> None:
        self._template = template
        self._placeholders = placeholders
        self._separator = separator
        self._forms: dict[tuple[str, bool], RoleForms] = {}
        self._developer: dict[bool, bool] = {}

    def takes_developer(self, *, with_tools: bool = False) -> bool:
        """Return whether the template treats the role ``developer`` differently from a made-up role."""
        if with_tools not in self._developer:
            printed = []
            meter = Meter(PROBE_LIMITS)
            for role in ("developer", _UNKNOWN_ROLE):
                found = self._probes(
                    role, "system", {"string": _FIRST, "part": [_text(_FIRST)]}, with_tools, meter
                )
                printed.append(next((text for _, text in found if _FIRST in text), "").lower())
            echoed = printed[1].replace(_UNKNOWN_ROLE, "developer")
            self._developer[with_tools] = bool(printed[0]) and printed[0] != echoed
        return self._developer[with_tools]

    def of(self, role: str, *, with_tools: bool = False) -> RoleForms:
        """The forms that the template takes from ``role`` in a conversation with or without tools."""
        key = (role, with_tools)
        if key not in self._forms:
            self._forms[key] = self._probe(role, with_tools)
        return self._forms[key]

    def arrange(self, messages: Sequence[Message], *, with_tools: bool = False) -> list[dict[str, Any]]:
        """The messages as the template takes them. Items of each kind are numbered through all messages."""
        numbers = dict.fromkeys(self._placeholders.kinds, 0)
        arranged = []
        for message in messages:
            strings = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    strings.append(part.text)
                else:
                    numbers[part.kind] += 1
                    strings.append(self._placeholders.text(part.kind, numbers[part.kind]) or "")
            content = self._content(message, strings, self.of(message.role, with_tools=with_tools))
            arranged.append({"role": message.role, **content, **message.extra})
        return arranged

    def _content(self, message: Message, strings: Sequence[str], forms: RoleForms) -> dict[str, Any]:
        """``{"content": ...}`` of a message, or ``{}``; ``strings`` are its texts and placeholder strings."""
        parts = message.parts
        media = {part.kind for part in parts if isinstance(part, MediaPart)}
        if media:
            as_parts = media <= forms.media.keys() or "string" not in forms.texts
            if not as_parts:
                return {"content": self._separator.join(strings)}
            return {"content": [_part(part, forms) for part in parts]}
        written: Form = message.form
        if written == "parts" and len(parts) == 1:
            written = "part"
        wanted = _ORDER[written]
        form = next((form for form in wanted if form in forms.texts), wanted[0])
        if form == "absent":
            return {}
        if form == "string":
            return {"content": self._separator.join(strings)}
        if form == "part" and (parts or written == "absent"):
            strings = [self._separator.join(strings)]
        return {"content": [_text(text) for text in strings]}

    def _probe(self, role: str, with_tools: bool) -> RoleForms:
        meter = Meter(PROBE_LIMITS)
        contents: dict[Any, Any] = {
            "string": _FIRST,
            "part": [_text(_FIRST)],
            "parts": [_text(_FIRST), _text(_SECOND)],
        }
        if role == "assistant":
            contents["absent"] = None
        shapes = [(kind, shape) for kind in self._placeholders.kinds for shape in _shapes(kind)]
        if role in ("user", "tool"):
            contents |= {number: [shape, _text(_FIRST)] for number, (_, shape) in enumerate(shapes)}
        texts: set[str] = set()
        media: dict[str, Mapping[str, Any]] = {}
        for key, printed in self._probes(role, role, contents, with_tools, meter):
            if isinstance(key, str):
                if _shows(printed, key):
                    texts.add(key)
            elif _shows(printed, "part") and self._placeholders.count(printed) == {shapes[key][0]: 1}:
                media.setdefault(*shapes[key])
        return RoleForms(frozenset(texts), media)

    def _probes(
        self, role: str, like: str, contents: Mapping[Any, Any], with_tools: bool, meter: Meter
    ) -> Iterator[tuple[Any, str]]:
        """Each of ``contents`` of ``role`` that renders, and the text; other messages take every form.

        The conversations are those of the role ``like``; the first in which anything shows decides.
        """
        for roles in _CONVERSATIONS.get(like, _CONVERSATIONS["system"]):
            others = sorted({other for other in roles if other != "self"})
            shown = False
            for forms in itertools.product(("string", "part", "absent"), repeat=len(others)):
                companions = dict(zip(others, forms, strict=True))
                if any(form == "absent" and other != "call" for other, form in companions.items()):
                    continue
                for key, content in contents.items():
                    messages = [
                        _message(role, content, key == "absent")
                        if other == "self"
                        else _companion(other, companions[other])
                        for other in roles
                    ]
                    printed = self._template.try_render(
                        messages,
                        meter,
                        add_generation_prompt=messages[-1]["role"] != "assistant",
                        tools=[_TOOL] if with_tools else None,
                    )
                    if printed is not None:
                        shown = shown or (_FIRST in printed and key != "absent")
                        yield key, printed
            if shown:
                return


#: Forms to try for a message, by the form that the caller wrote it in.
_ORDER: Mapping[str, tuple[Form, ...]] = {
    "string": ("string", "part"),
    "part": ("part", "string"),
    "parts": ("parts", "part", "string"),
    "absent": ("absent", "string", "part"),
}


def _shows(printed: str, form: str) -> bool:
    """Return whether a rendered probe of ``form`` shows its texts as they are."""
    if form == "absent":
        return "None" not in printed
    return _FIRST in printed and (form != "parts" or _SECOND in printed)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _shapes(kind: str) -> Iterator[dict[str, Any]]:
    """Parts by which templates recognise media: Transformers' own first, then OpenAI's."""
    yield {"type": kind}
    yield {"type": kind, kind: ""}
    yield {"type": f"{kind}_url", f"{kind}_url": {"url": ""}}


def _part(part: TextPart | MediaPart, forms: RoleForms) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return _text(part.text)
    return dict(forms.media.get(part.kind, {"type": part.kind}))


def _message(role: str, content: Any, calls: bool) -> dict[str, Any]:
    """A probe of ``role``; with ``calls`` it has tool calls and no content."""
    message: dict[str, Any] = (
        {"role": role, "tool_calls": [_CALL]} if calls else {"role": role, "content": content}
    )
    if role == "tool":
        message |= {"tool_call_id": _CALL_ID, "name": "probe"}
    return message


def _companion(role: str, form: str) -> dict[str, Any]:
    if role != "call":
        return {"role": role, "content": "gamma" if form == "string" else [_text("gamma")]}
    content = {} if form == "absent" else {"content": "" if form == "string" else []}
    return {"role": "assistant", **content, "tool_calls": [_CALL]}
