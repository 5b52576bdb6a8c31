"""Responses under construction: their items, and the typed events that build them up."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.answers import ChoiceDelta, continues
from deployments.tools import names_in_namespaces
from engine.errors import SightlineError
from engine.outputs import Usage
from engine.parsers.events import CallArguments, CallStart, Event, Reasoning, Text

Json = dict[str, Any]

#: Incomplete responses' reasons by finish reason.
_INCOMPLETE = {"length": "max_output_tokens"}


class ResponseBuilder:
    """Builds a response from an answer's events.

    Args:
        response: the response object without output; it is completed in place.
    """

    def __init__(self, response: Json) -> None:
        self.response = response
        self._sequence = 0
        self._item: Json | None = None
        self._last: Event | None = None
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        # Of texts that have not come yet.
        self._waiting: list[Json] = []
        self._namespaces = names_in_namespaces(response["tools"])

    def begin(self) -> list[Json]:
        """The events before any output."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def add(self, delta: ChoiceDelta, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Append what the answer gained.

        Args:
            logprobs: of the tokens of the next visible text, in the form that the events carry.
        """
        self._waiting = [*self._waiting, *logprobs]
        for event in delta.events:
            if not continues(self._last, event):
                yield from self._end_item()
                yield from self._begin_item(event)
            self._last = event
            yield from self._extend(event)
            if isinstance(event, Text):
                self._waiting = []

    def finish(
        self, reason: str | None, usage: Usage, reasoning_tokens: int, extras: Mapping[str, Any] = {}
    ) -> Iterator[Json]:
        """End the response, as completed or incomplete.

        Args:
            extras: further fields of the usage.
        """
        incomplete = _INCOMPLETE.get(reason or "")
        if self._waiting and isinstance(self._last, Text):
            # Tokens of the stop string, as chats have them.
            yield from self._extend(Text(""))
        # A stop string or token that ends the answer within a call: nobody may run that call.
        cut = isinstance(self._last, CallStart | CallArguments) and reason != "tool_calls"
        yield from self._end_item("incomplete" if incomplete or cut else "completed")
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            **extras,
        }
        if incomplete:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": incomplete}
        else:
            self.response["status"] = "completed"
        yield self._whole(f"response.{self.response['status']}")

    def fail(self, error: SightlineError) -> Json:
        """End the response after a failure."""
        self.mark_failed(error)
        return self._whole("response.failed")

    def end_as(self, response: Json) -> Iterator[Json]:
        """End the response as ``response`` has ended, whose output it has by now."""
        yield from self._end_item(response["output"][-1]["status"] if response["output"] else "completed")
        self.response = response
        if response["status"] != "cancelled":
            yield self._whole(f"response.{response['status']}")

    def mark_failed(self, error: SightlineError) -> None:
        """Note a failure in the response."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": error.message}

    def _whole(self, kind: str) -> Json:
        # A copy: the response goes on changing.
        return self._event(kind, response={**self.response, "output": list(self.response["output"])})

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    @property
    def _place(self) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"])}

    def _id(self, kind: str) -> str:
        """The id of the next item: the same each time that the response is made."""
        name = f"{self.response['id']} {kind} {len(self.response['output'])}"
        return f"{kind}_{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    def _begin_item(self, event: Event) -> Iterator[Json]:
        self._text, self._logprobs = [], []
        if isinstance(event, Text):
            self._item = {
                "type": "message",
                "id": self._id("msg"),
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
        elif isinstance(event, Reasoning):
            self._item = {
                "type": "reasoning",
                "id": self._id("rs"),
                "summary": [],
                "status": "in_progress",
                "content": [],
            }
        else:
            assert isinstance(event, CallStart)
            self._item = {
                "type": "custom_tool_call" if event.is_free else "function_call",
                "id": self._id("ctc" if event.is_free else "fc"),
                "call_id": self._id("call"),
                "name": event.name,
                "input" if event.is_free else "arguments": "",
                "status": "in_progress",
            }
            if event.name in self._namespaces:
                self._item["namespace"], self._item["name"] = self._namespaces[event.name]
        index = len(self.response["output"])
        yield self._event("response.output_item.added", output_index=index, item=dict(self._item))
        if not isinstance(event, CallStart):
            yield self._event(
                "response.content_part.added", **self._place, content_index=0, part=self._part()
            )

    def _part(self) -> Json:
        assert self._item is not None
        text = "".join(self._text)
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _extend(self, event: Event) -> Iterator[Json]:
        if isinstance(event, CallStart):
            return
        self._text.append(event.text)
        place = self._place
        if isinstance(event, CallArguments):
            kind = "custom_tool_call_input" if event.is_free else "function_call_arguments"
            yield self._event(f"response.{kind}.delta", **place, delta=event.text)
        elif isinstance(event, Reasoning):
            yield self._event("response.reasoning_text.delta", **place, content_index=0, delta=event.text)
        else:
            self._logprobs += self._waiting
            yield self._event(
                "response.output_text.delta",
                **place,
                content_index=0,
                delta=event.text,
                logprobs=self._waiting,
            )

    def _end_item(self, status: str = "completed") -> Iterator[Json]:
        item = self._item
        if item is None:
            return
        place, text = self._place, "".join(self._text)
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=text
            )
        elif item["type"] == "custom_tool_call":
            item["input"] = text
            yield self._event("response.custom_tool_call_input.done", **place, input=text)
        else:
            part = self._part()
            item["content"] = [part]
            if item["type"] == "reasoning":
                yield self._event("response.reasoning_text.done", **place, content_index=0, text=text)
            else:
                yield self._event(
                    "response.output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs
                )
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        item["status"] = status
        yield self._event(
            "response.output_item.done", output_index=len(self.response["output"]), item=dict(item)
        )
        self.response["output"].append(item)
        self._item = None
