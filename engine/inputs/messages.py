"""Checks OpenAI chat messages and splits them into text and media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from engine.errors import InvalidRequest, MediaError
from engine.inputs.embeds import is_pixels
from engine.inputs.pages import DOCUMENT_OPTIONS, FRAME_OPTIONS, page_options
from engine.inputs.tool_calls import FUNCTION_CALL_ID, function_call, tool_calls
from engine.inputs.video import media_kind, video_source
from engine.media.source import MediaSource, RowsSource
from engine.prompt import MediaPart, Message, TextPart

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
#: Most messages of a conversation, and most parts of one message.
MAX_MESSAGES = 4096
MAX_PARTS = 4096

DETAILS = ("auto", "low", "high", "original")

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: ``image_pil`` is vLLM's name of ``image`` for a PIL image.
_IMAGE_PARTS = ("image_url", "input_image", "image", "image_pil")
_VIDEO_PARTS = ("video_url", "input_video", "video")
_FILE_PARTS = ("file", "input_file")
_ROWS_PART = "image_embeds"
#: Longest ``uuid`` of a part.
MAX_UUID = 256
_DOCUMENT_PARTS = ("document_url", "document")
#: The fields that tell the kind of a part without a type. Those of texts are last: a null tells the least.
_NAMED_AS_KIND = (
    "image_url",
    "image",
    "image_pil",
    "video_url",
    "video",
    "document_url",
    "document",
    "file",
    _ROWS_PART,
    "text",
    "refusal",
)
_KEPT = ("name", "tool_call_id", "reasoning_content")
#: The name of thoughts that newer clients read, and send back.
_THOUGHT = "reasoning"


def parse_messages(raw: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[MediaSource]]:
    """Check a conversation and list its media in order. Nothing is fetched.

    Args:
        raw: OpenAI messages as plain data. Beside OpenAI's parts, offline callers may give
            ``{"type": "image", "image": PIL image | uint8 pixels (height, width, 3) | bytes | URL}`` and
            ``{"type": "video", "video": bytes | URL | [frame, ...]}`` with frames of the same kinds. Parts of
            videos take ``fps``, ``num_frames`` and, for lists of frames, ``timestamps``; those of documents
            ``pages``, ``max_pages``, ``dpi`` and ``text``; those of image files ``pages`` and ``max_pages``.

    Raises:
        InvalidRequest: naming ``messages[i].content[j]`` and what it should be.
    """
    if not isinstance(raw, list | tuple) or not raw:
        raise InvalidRequest("messages must be a list of at least one message.", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise InvalidRequest(
            f"{len(raw)} messages are more than the {MAX_MESSAGES} allowed.", param="messages"
        )
    sources: list[MediaSource] = []
    messages = [_message(message, f"messages[{i}]", sources) for i, message in enumerate(raw)]
    return messages, sources


def _message(raw: Any, where: str, sources: list[MediaSource]) -> Message:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content.", param=where)
    role = raw.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
    extra = {key: raw[key] for key in (*_KEPT, _THOUGHT) if raw.get(key) is not None}
    for key, value in extra.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"{where}.{key} must be a string.", param=f"{where}.{key}")
    if thought := extra.pop(_THOUGHT, None):
        extra.setdefault("reasoning_content", thought)
    if raw.get("tool_calls"):
        extra["tool_calls"] = tool_calls(raw["tool_calls"], f"{where}.tool_calls")
    elif raw.get("function_call"):
        extra["tool_calls"] = function_call(raw["function_call"], f"{where}.function_call")
    if role == "function":
        role = "tool"
        extra["tool_call_id"] = FUNCTION_CALL_ID
    if raw.get("audio") is not None:
        raise InvalidRequest(f"{where}.audio: there is no audio here.", param=f"{where}.audio")
    refusal = raw.get("refusal")
    if not isinstance(refusal, str | None):
        raise InvalidRequest(f"{where}.refusal must be a string.", param=f"{where}.refusal")
    content = raw.get("content")
    if content is None and role == "assistant":
        if refusal:
            content = refusal
        elif extra:
            return Message(role, [], extra, "absent")
    parts = _parts(content, f"{where}.content", role, sources)
    return Message(role, parts, extra, "string" if isinstance(content, str) else "parts")


def _parts(content: Any, where: str, role: str, sources: list[MediaSource]) -> list[TextPart | MediaPart]:
    if isinstance(content, str):
        return [TextPart(content)]
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where} must be a string or a list of parts.", param=where)
    if len(content) > MAX_PARTS:
        raise InvalidRequest(f"{where} has {len(content)} parts; {MAX_PARTS} are allowed.", param=where)
    parts: list[TextPart | MediaPart] = []
    for j, part in enumerate(content):
        parts.append(_part(part, f"{where}[{j}]", sources))
        if isinstance(parts[-1], MediaPart) and role not in ("user", "tool"):
            raise InvalidRequest(
                f"{where}[{j}]: only user and tool messages can hold media, not those of the role {role}.",
                param=f"{where}[{j}]",
            )
    return parts


def _part(part: Any, where: str, sources: list[MediaSource]) -> TextPart | MediaPart:
    if isinstance(part, str):
        return TextPart(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None and isinstance(part, Mapping):
        kind = _named_kind(part, where)
    kind = kind if isinstance(kind, str) else ""
    if kind in _TEXT_PARTS:
        key = _TEXT_PARTS[kind]
        if not isinstance(part.get(key), str):
            raise InvalidRequest(f"{where}.{key} must be a string.", param=f"{where}.{key}")
        return TextPart(part[key])
    index = len(sources)
    uuid = _uuid(part, where) if kind else ""
    if kind in _IMAGE_PARTS:
        source = _image(part, kind, index, where, uuid)
    elif kind in _VIDEO_PARTS:
        source = video_source(part, kind, index, where, uuid)
    elif kind in _FILE_PARTS:
        source = _file(part, kind, index, where)
    elif kind in _DOCUMENT_PARTS:
        source = _document(part, kind, index, where, uuid)
    elif kind == _ROWS_PART:
        source = _rows(part, index, where, uuid)
    else:
        raise InvalidRequest(
            f"{where}.type must be text, image_url, input_image, image, image_embeds, video_url, video, "
            "document_url or file.",
            param=f"{where}.type",
        )
    sources.append(replace(source, uuid=uuid))
    return MediaPart(index, source.kind)


def _named_kind(part: Mapping[str, Any], where: str) -> str | None:
    """The kind of a part without a type; None if no field tells it.

    Raises:
        InvalidRequest: fields of several kinds do, and all but one would be lost.
    """
    present = [name for name in _NAMED_AS_KIND if name in part]
    # A boolean is an option of documents: whether their texts are shown.
    given = [name for name in present if part[name] is not None and not isinstance(part[name], bool)]
    if len(given) > 1:
        raise InvalidRequest(
            f"{where}.type is needed: the part has {' and '.join(given)}, and a part is one of them.",
            param=f"{where}.type",
        )
    return next(iter(given or present), None)


def _uuid(part: Mapping[str, Any], where: str) -> str:
    """The caller's own name for the content of a part; empty if there is none."""
    uuid = part.get("uuid")
    if uuid is None:
        return ""
    if not isinstance(uuid, str) or not 0 < len(uuid) <= MAX_UUID:
        raise InvalidRequest(
            f"{where}.uuid must be a string of 1 to {MAX_UUID} characters.", param=f"{where}.uuid"
        )
    return uuid


def _image(part: Mapping[str, Any], kind: str, index: int, where: str, uuid: str) -> MediaSource:
    part_where = where
    key = "image" if kind == "image" and "image" in part else "image_url"
    key = "url" if kind == "image" and "url" in part else key
    key = kind if kind == "image_pil" else key
    if part.get("source") is not None and part.get(key) is None:
        raise InvalidRequest(
            f"{where}.source: give the image as image_url, an object with its url (http, https or data).",
            param=f"{where}.source",
        )
    value, holders, where = part.get(key), [(part, where)], f"{where}.{key}"
    if isinstance(value, Mapping):
        holders.insert(0, (value, where))
        value, where = value.get("url"), f"{where}.url"
    detail, options = _detail(holders), _options(holders, FRAME_OPTIONS)
    _check_no_file_id(part, part_where, key)
    if value is None and uuid:
        source = MediaSource(index, f"{part_where}.uuid", detail=detail)
    else:
        source = _source(value, index, where, detail)
    if not options:
        return source
    if source.image is not None:
        at = next(iter(options.values()))[1]
        raise InvalidRequest(f"{at} is for image files, not for PIL images.", param=at)
    return replace(source, pages=page_options(options))


def _check_no_file_id(part: Mapping[str, Any], where: str, instead: str) -> None:
    if part.get("file_id") is not None:
        raise InvalidRequest(
            f"{where}.file_id: this server keeps no files; send {instead}.", param=f"{where}.file_id"
        )


def _detail(holders: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    """The ``detail`` of the first of ``holders`` that has one; beside each stands its place."""
    for holder, where in holders:
        if detail := holder.get("detail"):
            if detail not in DETAILS:
                raise InvalidRequest(f"detail must be one of {', '.join(DETAILS)}.", param=f"{where}.detail")
            return detail
    return "auto"


def _options(
    holders: Sequence[tuple[Mapping[str, Any], str]], names: Sequence[str]
) -> dict[str, tuple[Any, str]]:
    """Value and place of the options that are given; the first of ``holders`` counts."""
    return {
        name: (holder[name], f"{where}.{name}")
        for holder, where in reversed(holders)
        for name in names
        if holder.get(name) is not None
    }


def _rows(part: Mapping[str, Any], index: int, where: str, uuid: str) -> MediaSource:
    """An ``image_embeds`` part: a safetensors file in base64, alone or in an object with its description."""
    value, at, description = part.get(_ROWS_PART), f"{where}.{_ROWS_PART}", {}
    if isinstance(value, Mapping):
        description = {name: given for name, given in value.items() if name != _ROWS_PART}
        value, at = value.get(_ROWS_PART), f"{at}.{_ROWS_PART}"
    if value is None and uuid:
        return MediaSource(index, f"{where}.uuid")
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{at} must be a safetensors file in base64.", param=at)
    return MediaSource(index, at, rows=RowsSource(value, description))


def _source(value: Any, index: int, where: str, detail: str) -> MediaSource:
    if isinstance(value, str) and value:
        return MediaSource(index, where, url=value, detail=detail)
    if isinstance(value, bytes | bytearray):
        return MediaSource(index, where, data=bytes(value), detail=detail)
    if hasattr(value, "convert") and hasattr(value, "size"):
        return MediaSource(index, where, image=value, detail=detail)
    if is_pixels(value):
        return MediaSource(index, where, image=Image.fromarray(value), detail=detail)
    raise MediaError(f"{where} must be the URL of an image (http, https or data).", param=where)


def _document(part: Mapping[str, Any], kind: str, index: int, where: str, uuid: str) -> MediaSource:
    """A ``document_url`` or ``document`` part: a PDF by its URL, or as bytes."""
    part_where = where
    value, holders, where = part.get(kind), [(part, where)], f"{where}.{kind}"
    if isinstance(value, Mapping):
        holders.insert(0, (value, where))
        value, where = value.get("url"), f"{where}.url"
    asked, detail = page_options(_options(holders, DOCUMENT_OPTIONS)), _detail(holders)
    if value is None and uuid:
        return MediaSource(index, f"{part_where}.uuid", "document", pages=asked, detail=detail)
    if isinstance(value, str) and value:
        return MediaSource(index, where, "document", url=value, pages=asked, detail=detail)
    if isinstance(value, bytes | bytearray):
        return MediaSource(index, where, "document", data=bytes(value), pages=asked, detail=detail)
    raise MediaError(f"{where} must be the URL of a PDF (http, https or data).", param=where)


def _file(part: Mapping[str, Any], kind: str, index: int, where: str) -> MediaSource:
    """A ``file`` part: an image, a video or a document, as its data URL or its name says."""
    holders = [(part, where)]
    if kind == "file":
        where = f"{where}.file"
        if not isinstance(part.get("file"), Mapping):
            raise InvalidRequest(f"{where} must be an object with file_data or file_url.", param=where)
        holders.insert(0, (part["file"], where))
    holder = holders[0][0]
    _check_no_file_id(holder, where, "file_data")
    if not isinstance(holder.get("filename"), str | None):
        raise InvalidRequest(f"{where}.filename must be a string.", param=f"{where}.filename")
    field = "file_url" if holder.get("file_data") is None and holder.get("file_url") else "file_data"
    value, where = holder.get(field), f"{where}.{field}"
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where} must be a data URL.", param=where)
    found = media_kind(value, holder.get("filename"))
    if found is None and field == "file_url":
        # An address without a known ending: images and videos have parts of their own.
        found = "document"
    if found is None:
        raise InvalidRequest(
            f"{where}: only images, videos and PDF can be read, told by a data URL such as "
            "data:application/pdf;base64,... or by a filename.",
            param=where,
        )
    if field == "file_data" and not value.startswith("data:"):
        value = f"data:{found}/*;base64,{value}"
    source = MediaSource(index, where, found, url=value, detail=_detail(holders))
    if found == "document":
        return replace(source, pages=page_options(_options(holders, DOCUMENT_OPTIONS)))
    options = _options(holders, FRAME_OPTIONS) if found == "image" else {}
    return replace(source, pages=page_options(options)) if options else source
