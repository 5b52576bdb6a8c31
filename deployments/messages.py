"""Answers in Anthropic's form: content blocks, and the typed events that build them up."""

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from deployments.answers import ChoiceDelta, continues
from engine.outputs import Usage
from engine.parsers.events import CallStart, Event, Reasoning, Text

Json = dict[str, Any]


class MessageBuilder:
    """Builds a message from an answer's events.

    Args:
        model: the model's name.
        max_tokens: of the request.
        shows_thoughts: False leaves the text of thoughts out.

    Attributes:
        message: the message so far, without the block that is open.
    """

    def __init__(self, model: str, max_tokens: int, *, shows_thoughts: bool = True) -> None:
        self.message: Json = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage()),
        }
        self._max_tokens = max_tokens
        self._shows_thoughts = shows_thoughts
        self._last: Event | None = None
        self._block: Json = {}
        self._pieces: list[str] = []

    def begin(self, usage: Usage) -> list[Json]:
        """The events before any content."""
        started = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        message = {**self.message, "content": [], "usage": _usage(started)}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def add(self, delta: ChoiceDelta) -> Iterator[Json]:
        """Append what the answer gained."""
        for event in delta.events:
            if not continues(self._last, event):
                yield from self._end_block()
                self._block = _empty_block(event)
                yield self._event("content_block_start", content_block=dict(self._block))
            self._last = event
            if not isinstance(event, CallStart):
                self._pieces.append(event.text)
                yield from self._delta(event)

    def finish(
        self, delta: ChoiceDelta | None, usage: Usage, reasoning_tokens: int, extras: Mapping[str, Any] = {}
    ) -> Iterator[Json]:
        """End the message.

        Args:
            delta: the last one.
            extras: further fields of the usage.
        """
        yield from self._end_block()
        stop_reason, sequence = self._stop_reason(delta, usage.completion_tokens)
        counts = {**_usage(usage, reasoning_tokens), **extras}
        self.message |= {"stop_reason": stop_reason, "stop_sequence": sequence, "usage": counts}
        ended = {"stop_reason": stop_reason, "stop_sequence": sequence}
        yield {"type": "message_delta", "delta": ended, "usage": counts}
        yield {"type": "message_stop"}

    def _stop_reason(self, delta: ChoiceDelta | None, tokens: int) -> tuple[str, str | None]:
        reason = delta.finish_reason if delta is not None else None
        if reason == "length":
            full = tokens >= self._max_tokens
            return "max_tokens" if full else "model_context_window_exceeded", None
        if reason == "tool_calls":
            return "tool_use", None
        if delta is not None and isinstance(delta.stop_reason, str):
            return "stop_sequence", delta.stop_reason
        return "end_turn", None

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "index": len(self.message["content"]), **fields}

    def _delta(self, event: Event) -> Iterator[Json]:
        assert not isinstance(event, CallStart)
        if isinstance(event, Text):
            delta = {"type": "text_delta", "text": event.text}
        elif isinstance(event, Reasoning):
            if not self._shows_thoughts:
                return
            delta = {"type": "thinking_delta", "thinking": event.text}
        else:
            delta = {"type": "input_json_delta", "partial_json": event.text}
        yield self._event("content_block_delta", delta=delta)

    def _end_block(self) -> Iterator[Json]:
        last, self._last = self._last, None
        if last is None:
            return
        text = "".join(self._pieces)
        self._pieces = []
        block = self._block
        if isinstance(last, Text):
            block["text"] = text
        elif isinstance(last, Reasoning):
            block["thinking"] = text if self._shows_thoughts else ""
            # Clients keep a thought only with a signature. Nothing is checked when it comes back.
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            yield self._event(
                "content_block_delta", delta={"type": "signature_delta", "signature": block["signature"]}
            )
        else:
            # An answer that was cut gives the arguments that are whole.
            found = from_json(text or "{}", allow_partial=True)
            block["input"] = found if isinstance(found, dict) else {}
        yield self._event("content_block_stop")
        self.message["content"].append(block)


def _empty_block(event: Event) -> Json:
    if isinstance(event, Text):
        return {"type": "text", "text": ""}
    if isinstance(event, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    assert isinstance(event, CallStart)
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": event.name, "input": {}}


def _usage(usage: Usage, reasoning_tokens: int = 0) -> Json:
    """Token counts. Anthropic's ``input_tokens`` are those that were computed."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": reasoning_tokens},
    }
