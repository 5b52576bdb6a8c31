"""Anthropic's content blocks as messages and parts in OpenAI's form."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from deployments.errors import UnsupportedParameter
from deployments.unknown_fields import log_unknown
from engine.errors import InvalidRequest
from engine.inputs.pages import DOCUMENT_OPTIONS

Json = dict[str, Any]

_ROLES = ("user", "assistant", "system")

#: Fields of every block. Every prompt is cached, so that cache_control changes nothing.
_ANY = frozenset({"type", "cache_control"})

#: Further fields of blocks by their type. Some change no answer: citations of a text, which models are not
#: shown; signatures and encrypted thoughts, which nothing checks or reads; callers and toolsets of functions,
#: which only clients call; and transformations, since images are resized as the model wants them.
_FIELDS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", "citations"}),
    "image": frozenset({"source", "transformations"}),
    "document": frozenset({"source", "title", "context", "citations", *DOCUMENT_OPTIONS}),
    "search_result": frozenset({"content", "source", "title", "citations"}),
    "thinking": frozenset({"thinking", "signature"}),
    "redacted_thinking": frozenset({"data"}),
    "tool_use": frozenset({"id", "name", "input", "caller", "toolset_name"}),
    "tool_result": frozenset({"tool_use_id", "content", "is_error", "toolset_name"}),
}
_SOURCE = frozenset({"type", "media_type", "data", "url", "content"})


class ChatMessages:
    """A conversation that grows message by message.

    Attributes:
        messages: in OpenAI's form. Neighbours of one role are one message, as in Anthropic's API.
        fields: the caller's fields by the path of the message or part that was made from them.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self.fields: dict[str, str] = {}

    @property
    def continues(self) -> bool:
        """True if the answer goes on with the last message's text."""
        last = self.messages[-1] if self.messages else {}
        return last.get("role") == "assistant" and bool(last.get("content")) and "tool_calls" not in last

    def add(self, message: Any, where: str) -> None:
        """Append a message.

        Args:
            where: the caller's field.

        Raises:
            InvalidRequest, UnsupportedParameter: naming the block that can't be used.
        """
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise InvalidRequest(
                f"{where} must be an object with content and one of the roles {', '.join(_ROLES)}.",
                param=where,
            )
        _note(message, ("role", "content"), "messages[].")
        role, content = message["role"], message.get("content")
        where_content = where if where == "system" else f"{where}.content"
        if isinstance(content, str):
            self._part(role, {"type": "text", "text": content}, where_content)
            return
        if not isinstance(content, list):
            raise InvalidRequest(
                f"{where_content} must be a string or a list of blocks.", param=where_content
            )
        if not content:
            self._message(role, where).setdefault("content", [])
        for index, block in enumerate(content):
            self._block(role, block, f"{where_content}[{index}]")

    def _block(self, role: str, block: Any, where: str) -> None:
        kind = _kind(block)
        if kind in ("thinking", "redacted_thinking", "tool_use"):
            if role != "assistant":
                raise InvalidRequest(f"{where}: only an assistant message can hold {kind}.", param=where)
            self._assistant_block(kind, block, where)
        elif kind == "tool_result":
            if role != "user":
                raise InvalidRequest(f"{where}: only a user message can hold tool_result.", param=where)
            self._tool_result(block, where)
        else:
            for part, source in _parts(block, where):
                self._part(role, part, source)

    def _assistant_block(self, kind: str, block: Mapping[str, Any], where: str) -> None:
        message = self._message("assistant", where)
        if kind == "thinking":
            thought = _string(block, "thinking", where)
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            given = block.get("input") or {}
            if not isinstance(given, Mapping):
                raise InvalidRequest(f"{where}.input must be an object.", param=f"{where}.input")
            calls = message.setdefault("tool_calls", [])
            self.fields[f"{self._last}.tool_calls[{len(calls)}]"] = where
            function = {"name": _string(block, "name", where), "arguments": given}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        else:
            # Nobody here can read what redacted_thinking holds.
            message.setdefault("content", [])

    def _tool_result(self, block: Mapping[str, Any], where: str) -> None:
        # A message of its own, whatever comes before: each answers one call.
        self.messages.append(
            {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": []}
        )
        self.fields[self._last] = where
        if not isinstance(block.get("is_error"), bool | None):
            raise InvalidRequest(f"{where}.is_error must be true or false.", param=f"{where}.is_error")
        if block.get("is_error"):
            self._part("tool", {"type": "text", "text": "Error: "}, f"{where}.is_error")
        content = block.get("content") or []
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise InvalidRequest(
                f"{where}.content must be a string or a list of blocks.", param=f"{where}.content"
            )
        for index, inner in enumerate(content):
            for part, source in _parts(inner, f"{where}.content[{index}]"):
                self._part("tool", part, source)

    @property
    def _last(self) -> str:
        return f"messages[{len(self.messages) - 1}]"

    def _message(self, role: str, where: str) -> Json:
        """The last message if it has this role, else a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role})
            self.fields[self._last] = where
        return self.messages[-1]

    def _part(self, role: str, part: Json, where: str) -> None:
        content = self._message(role, where).setdefault("content", [])
        place = f"{self._last}.content[{len(content)}]"
        self.fields[place] = where
        if part["type"] == "image_url":
            self.fields[f"{place}.image_url.url"] = f"{where}.source"
        if part["type"] == "document_url":
            self.fields[f"{place}.document_url"] = f"{where}.source"
        content.append(part)


def _note(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    log_unknown("MessagesBody", given, known, where)


def _kind(block: Any) -> str | None:
    """The type of a block, whose unknown fields are logged."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        return None
    if kind in _FIELDS:
        _note(block, _FIELDS[kind] | _ANY, "content[].")
        if isinstance(source := block.get("source"), Mapping):
            _note(source, _SOURCE, "content[].source.")
    return kind


def _parts(block: Any, where: str) -> list[tuple[Json, str]]:
    """A block as parts, each with the caller's field."""
    kind = _kind(block)
    if kind == "text":
        return [({"type": "text", "text": _string(block, "text", where)}, where)]
    if kind == "image":
        url = _url(block.get("source"), f"{where}.source")
        return [({"type": "image_url", "image_url": {"url": url}}, where)]
    if kind == "search_result":
        _check_citations(block, where)
        titles = _titles(block, ("title", "source"), where)
        return [*titles, *_inner_parts(block.get("content"), f"{where}.content")]
    if kind == "document":
        _check_citations(block, where)
        return [*_titles(block, ("title", "context"), where), *_document(block, where)]
    raise UnsupportedParameter(
        f"Unsupported parameter: {where}.type is {str(kind)[:40]!r}; text, image, tool_use, tool_result, "
        "thinking, document and search_result are supported.",
        param=f"{where}.type",
    )


def _document(block: Mapping[str, Any], where: str) -> list[tuple[Json, str]]:
    source: Any = block.get("source")
    form = source.get("type") if isinstance(source, Mapping) else None
    if form == "text":
        return [({"type": "text", "text": _string(source, "data", f"{where}.source")}, where)]
    if form == "content":
        return _inner_parts(source.get("content"), f"{where}.source.content")
    options = {name: block[name] for name in DOCUMENT_OPTIONS if name in block}
    return [({"type": "document_url", "document_url": _url(source, f"{where}.source"), **options}, where)]


def _titles(block: Mapping[str, Any], names: Sequence[str], where: str) -> list[tuple[Json, str]]:
    """The texts that say what a source is, each on a line ahead of it."""
    return [
        ({"type": "text", "text": f"{_string(block, name, where)}\n"}, f"{where}.{name}")
        for name in names
        if block.get(name) is not None
    ]


def _check_citations(block: Mapping[str, Any], where: str) -> None:
    """Refuse to cite a source.

    Raises:
        InvalidRequest, UnsupportedParameter: naming the field.
    """
    given, field = block.get("citations"), f"{where}.citations"
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{field} must be an object.", param=field)
    if given.get("enabled"):
        raise UnsupportedParameter(
            f"Unsupported parameter: '{field}.enabled' is not supported; answers cite no sources",
            param=f"{field}.enabled",
        )


def _inner_parts(content: Any, where: str) -> list[tuple[Json, str]]:
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of blocks.", param=where)
    return [part for index, inner in enumerate(content) for part in _parts(inner, f"{where}[{index}]")]


def _url(source: Any, where: str) -> str:
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "url":
        return _string(source, "url", where)
    if kind == "base64":
        return f"data:{_string(source, 'media_type', where)};base64,{_string(source, 'data', where)}"
    raise InvalidRequest(
        f"{where}.type must be base64 or url; files are not kept here.", param=f"{where}.type"
    )


def _string(holder: Mapping[str, Any], name: str, where: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value
