"""Conversations, and the prompts that mistral-common 1.13.1 makes of them in each version of its chat format.

Where mistral-common is installed, ``python -m tests.engine.inputs.mistral_chats`` writes the prompts again.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.engine.text.tekken_file import SPECIALS, write_tekken

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says the weather of a città.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}},
]
IMAGE: dict[str, Any] = {"type": "image"}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _call(name: str, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def _says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_CALLS = [_call("get_weather", {"city": "Zürich", "days": 2}, "abc123DEF"), _call("f", {}, "abc123DEG")]
_RESULTS = [
    _says("tool", "20 °C", tool_call_id="abc123DEF"),
    _says("tool", '{"a": 1}', tool_call_id="abc123DEG"),
]
#: Messages, and whether there are tools.
CHATS: list[tuple[list[dict[str, Any]], bool]] = [
    ([_says("system", "Be  brief."), _says("user", "Hi\n")], False),
    ([_says("user", "a"), _says("assistant", "b"), _says("user", "c")], False),
    ([_says("user", [_text("what?"), IMAGE])], False),
    ([_says("user", [IMAGE, _text("what?")])], False),
    ([_says("user", [_text("x"), IMAGE, _text("y"), _text("z")])], False),
    ([_says("user", [IMAGE, IMAGE, _text("both")]), _says("user", [IMAGE])], False),
    (
        [
            _says("user", "a"),
            _says("user", "b"),
            _says("assistant", "c"),
            _says("assistant", "d"),
            _says("user", "e"),
        ],
        False,
    ),
    ([_says("system", "one"), _says("user", "x"), _says("assistant", "y"), _says("user", "Weather?")], True),
    ([_says("user", "W?"), _says("assistant", "", tool_calls=_CALLS[:1]), _RESULTS[0]], True),
    (
        [
            _says("user", "W?"),
            _says("assistant", "", tool_calls=_CALLS),
            *_RESULTS[::-1],
            _says("assistant", "It is 20.  "),
            _says("user", "Thanks"),
        ],
        True,
    ),
    ([_says("system", [_text("one"), _text("two")]), _says("user", [IMAGE, _text("what?")])], False),
    ([_says("system", "Be brief."), _says("user", [_text("x"), IMAGE, _text(""), _text("y")])], False),
    ([_says("system", "one"), _says("user", "x"), _says("assistant", " y "), _says("user", "z")], False),
    (
        [
            _says("user", "W?"),
            _says("assistant", [_text("b"), _text("c ")]),
            _says("assistant", "d "),
            _says("user", [_text("e"), _text("f")]),
            _says("user", [_text("g"), _text("h")]),
        ],
        True,
    ),
]
#: A text in front of calls, which v3 has no form for.
TEXT_AND_CALLS = [
    _says("user", "W?"),
    _says("assistant", "Let me see.", tool_calls=_CALLS),
    *_RESULTS,
    _says("assistant", "It is 20."),
    _says("user", "Thanks"),
]
#: A thought in front of an answer, which versions have a form for from v13 on.
THOUGHT = [
    _says("user", "a"),
    _says("assistant", "b ", reasoning_content="let me"),
    _says("user", "c"),
]


def chats_of(version: str) -> list[tuple[list[dict[str, Any]], bool]]:
    """All conversations that a version has a form for, and whether there are tools."""
    number = int(version[1:])
    return CHATS + [(TEXT_AND_CALLS, True)] * (number > 3) + [(THOUGHT, False)] * (number >= 13)


#: The last version, where a request asks for an effort that isn't the default.
EFFORT = "v15, high"


def recorded() -> dict[str, list[list[int]]]:
    """Return the ids of mistral-common's prompts of :func:`chats_of` by version. ``[IMG]`` is an image."""
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def _for_theirs(messages: list[dict[str, Any]], url: str) -> list[dict[str, Any]]:
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if isinstance(message["content"], list):
            image = {"type": "image_url", "image_url": {"url": url}}
            message["content"] = [image if part == IMAGE else part for part in message["content"]]
        if thought := message.pop("reasoning_content", None):
            thinking = {"type": "thinking", "thinking": thought, "closed": True}
            message["content"] = [thinking, _text(message["content"])]
    return messages


def _record() -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    end = SPECIALS.index("[IMG_END]")  # 16 by 16 pixels are one [IMG] and the end
    found = {}
    for name in (*VERSIONS, EFFORT):
        version, _, effort = name.partition(", ")
        with tempfile.TemporaryDirectory() as folder:
            theirs = MistralTokenizer.from_file(write_tekken(Path(folder), version))
        prompts = []
        for messages, with_tools in chats_of(version):
            request = ChatCompletionRequest.from_openai(
                _for_theirs(messages, url),
                tools=TOOLS if with_tools else None,
                **({"reasoning_effort": effort} if effort else {}),
            )
            ids = theirs.encode_chat_completion(request).tokens
            prompts.append([token for token in ids if token != end])
        found[name] = prompts
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, prompts)) + "\n]"
        for name, prompts in found.items()
    ]
    Path(__file__).with_suffix(".json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _record()
