"""Messages, texts or ids, and the media that belong to them, to the engine's input."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import Family
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.control_text import ControlText, StandIns
from engine.inputs.marks import Marks
from engine.prompt import (
    EngineInput,
    MediaItem,
    MediaPart,
    MediaSpan,
    Message,
    PlaceholderRun,
    TextPart,
)
from engine.text.tokenizer import Tokenizer

Placeholder = Callable[[MediaItem, int], tuple[PlaceholderRun, ...]]
_NOTHING = StandIns({})


class PromptBuilder:
    """Places every item of media in the prompt of one model.

    Marks of pictures are found where the template (or, in a raw prompt, its author) put them, never in the
    texts of chat messages: control strings typed there are tokenised as plain text.

    Args:
        tokenizer: the model's.
        template: the chat template; None if there is none.
        prompt_format: how the family's prompts mark media.
        placeholder: token runs for an item, and its number in the prompt from 0; its own if not given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        prompt_format: PromptFormat,
        placeholder: Placeholder | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._format = prompt_format
        self._placeholder = placeholder or (lambda item, index: item.placeholder)
        self._marks = Marks(prompt_format, tokenizer)
        self._control = ControlText(tokenizer, self._marks.patterns)

    @classmethod
    def for_model(
        cls, family: Family, config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> PromptBuilder:
        """The builder for a checkpoint of a family."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def placeholder(item: MediaItem, index: int) -> tuple[PlaceholderRun, ...]:
            return family.placeholder(config, item, index, encode)

        return cls(tokenizer, template, family.prompt_format(config), placeholder)

    def with_template(self, template: str | Path) -> PromptBuilder:
        """The same builder with another chat template: a file, or Jinja text.

        For the owner of the process only: a template from a request must not come here.

        Raises:
            ConfigError: it is neither, or doesn't parse.
        """
        other = ChatTemplate.load("", self.tokenizer.config, template)
        return PromptBuilder(self.tokenizer, other, self._format, self._placeholder)

    def from_messages(
        self,
        messages: Sequence[Message],
        items: Sequence[MediaItem] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
    ) -> EngineInput:
        """The prompt of a conversation: the ids of Transformers' ``apply_chat_template``, media expanded.

        Args:
            messages: as :func:`engine.inputs.messages.parse_messages` gives them.
            items: the media, by the index that the messages' :class:`MediaPart` carry.

        Raises:
            InvalidRequest: there is no template, it refuses the messages, or its marks don't fit the items.
        """
        if self.template is None:
            raise InvalidRequest(
                "This model has no chat template. Set chat_template to a Jinja file for it when the model is "
                "loaded, or give a finished prompt instead of messages.",
                param="messages",
            )
        if not messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        in_order = [part for message in messages for part in message.parts if isinstance(part, MediaPart)]
        if sorted(part.index for part in in_order) != list(range(len(items))):
            raise InvalidRequest(
                f"The messages refer to {len(in_order)} media items, but {len(items)} were given.",
                param="messages",
            )
        for part in in_order:
            if self._marks.text(part.kind, 1) is None:
                raise InvalidRequest(f"This model takes no {part.kind}.", param="messages")
        protected, stand_ins = self._control.protect(
            [self._text_only(message) for message in messages], list(tools or ()), dict(template_kwargs or {})
        )
        text = self.template.render(
            self._with_media(protected[0], messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=protected[1] or None,
            options=protected[2],
        )
        bos = self.tokenizer.token_text("bos_token")
        add_special = bool(self._marks) and not (bos and text.startswith(bos))
        return self._build(text, stand_ins, [items[p.index] for p in in_order], add_special, cache_salt)

    def from_text(
        self,
        prompt: str,
        items: Sequence[MediaItem] = (),
        *,
        add_special_tokens: bool = True,
        cache_salt: str = "",
    ) -> EngineInput:
        """A finished prompt with the model's own marks, one for each item of each kind, in order.

        Raises:
            InvalidRequest: the marks don't fit the items.
        """
        return self._build(prompt, _NOTHING, items, add_special_tokens, cache_salt)

    def from_token_ids(
        self, ids: Sequence[int], items: Sequence[MediaItem] = (), *, cache_salt: str = ""
    ) -> EngineInput:
        """A tokenised prompt, in which each item is one mark, or already its whole placeholder.

        Raises:
            InvalidRequest: neither fits the items, or an id is no integer.
        """
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError:
            raise InvalidRequest("Token ids must be a list of integers.", param="prompt_token_ids") from None
        spans = self._find_expanded(ids, items)
        if spans is not None:
            return EngineInput(ids, spans, None, cache_salt)
        return self._expanded(_Prompt(), ids, items, None, cache_salt)

    def _text_only(self, message: Message) -> dict[str, Any]:
        """What the caller wrote in a message: all its texts, in the parts that they came in."""
        role = message.role
        if role == "developer" and self.template is not None and not self.template.knows_developer:
            role = "system"
        texts = [{"text": part.text} for part in message.parts if isinstance(part, TextPart)]
        return {**message.extra, "role": role, "content": texts}

    def _with_media(self, texts: Sequence[Mapping[str, Any]], messages: Sequence[Message]) -> list[dict]:
        """Template messages: the texts, already protected, with media at their places again."""
        assert self.template is not None
        numbers: dict[str, int] = {}
        rendered = []
        for protected, message in zip(texts, messages, strict=True):
            written = iter(protected["content"])
            parts: list[dict[str, Any]] = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    parts.append({"type": "text", "text": next(written)["text"]})
                else:
                    numbers[part.kind] = numbers.get(part.kind, 0) + 1
                    parts.append({"type": part.kind, "mark": self._marks.text(part.kind, numbers[part.kind])})
            content: Any = [{k: v for k, v in part.items() if k != "mark"} for part in parts]
            if not self.template.takes_parts:
                content = self._format.separator.join(
                    part.get("text") or part.get("mark", "") for part in parts
                )
            rendered.append({**protected, "content": content})
        return rendered

    def _build(
        self, text: str, stand_ins: StandIns, items: Sequence[MediaItem], add_special: bool, cache_salt: str
    ) -> EngineInput:
        shown = stand_ins.restore(text)
        if not self._marks.split:
            ids = self._control.encode(text, stand_ins, add_special_tokens=add_special)
            return self._expanded(_Prompt(), ids, items, shown, cache_salt)
        chunks, marks = self._marks.split_text(text)
        places = self._places(marks, items)
        each = self._format.split_at_media
        prompt = _Prompt()
        if add_special and not each:
            prompt.add_ids(self.tokenizer.special_prefix)
        for number, chunk in enumerate(chunks):
            if number:
                self._place(prompt, items, places[number - 1])
            prompt.add_ids(
                self._control.encode(
                    chunk,
                    stand_ins,
                    add_special_tokens=add_special and each,
                    at_start=each or number == 0,
                )
            )
        if add_special and not each:
            prompt.add_ids(self.tokenizer.special_suffix)
        return EngineInput(prompt.ids, prompt.spans, shown, cache_salt)

    def _expanded(
        self, prompt: _Prompt, ids: list[int], items: Sequence[MediaItem], text: str | None, cache_salt: str
    ) -> EngineInput:
        """Replace the k-th mark of a kind by the placeholder of its k-th item."""
        kinds = {token: kind for kind, token in self._marks.ids.items()}
        found = [(place, kinds[token]) for place, token in enumerate(ids) if token in kinds]
        places = self._places([(kind, None) for _, kind in found], items)
        start = 0
        for (place, _), index in zip(found, places, strict=True):
            prompt.add_ids(ids[start:place])
            self._place(prompt, items, index)
            start = place + 1
        prompt.add_ids(ids[start:])
        return EngineInput(prompt.ids, prompt.spans, text, cache_salt)

    def _places(self, marks: Sequence[tuple[str, int | None]], items: Sequence[MediaItem]) -> list[int]:
        """Index of the item that each mark stands for; marks have a kind and perhaps a number from 1."""
        of_kind = {
            kind: [i for i, item in enumerate(items) if item.kind == kind]
            for kind in {item.kind for item in items} | {kind for kind, _ in marks}
        }
        counts = dict.fromkeys(of_kind, 0)
        places = []
        for kind, number in marks:
            counts[kind] += 1
            place = (counts[kind] if number is None else number) - 1
            if 0 <= place < len(of_kind[kind]):
                places.append(of_kind[kind][place])
        if len(places) == len(marks) and sorted(set(places)) == list(range(len(items))):
            return places
        kind = next((k for k in of_kind if counts[k] != len(of_kind[k])), next(iter(of_kind)))
        mark = self._marks.text(kind, 1)
        raise InvalidRequest(
            f"The prompt has {counts[kind]} places for an item of kind {kind}, but {len(of_kind[kind])} were "
            + (
                f"given. In a raw prompt each is marked {mark!r}."
                if mark
                else f"given; the model takes no {kind}."
            ),
            param="messages",
        )

    def _place(self, prompt: _Prompt, items: Sequence[MediaItem], index: int) -> None:
        number = sum(item.kind == items[index].kind for item in items[:index])
        prompt.add_item(items[index], self._placeholder(items[index], number))

    def _find_expanded(self, ids: list[int], items: Sequence[MediaItem]) -> list[MediaSpan] | None:
        """Spans of placeholders that the ids hold already, whole and in order; None if that isn't so."""
        spans: list[MediaSpan] = []
        outside: list[int] = []
        start = 0
        for index in range(len(items)):
            expected = _Prompt()
            self._place(expected, items, index)
            place = _find(ids, expected.ids, start)
            if place is None:
                return None
            span = expected.spans[0]
            spans.append(MediaSpan(span.item, place, span.length, span.embed_index))
            outside += ids[start:place]
            start = place + span.length
        outside += ids[start:]
        return spans if set(self._marks.ids.values()).isdisjoint(outside) else None


class _Prompt:
    """Ids and spans of a prompt that is being put together."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.spans: list[MediaSpan] = []

    def add_ids(self, ids: Iterable[int]) -> None:
        self.ids += ids

    def add_item(self, item: MediaItem, runs: Sequence[PlaceholderRun]) -> None:
        offset = len(self.ids)
        for run in runs:
            self.ids += [run.token_id] * run.count
        embed_index = None
        if not all(run.is_embed for run in runs):
            mask = np.repeat([run.is_embed for run in runs], [run.count for run in runs])
            embed_index = np.flatnonzero(mask).astype(np.int32)
        self.spans.append(MediaSpan(item, offset, len(self.ids) - offset, embed_index))


def _find(ids: list[int], wanted: list[int], start: int) -> int | None:
    """Where ``wanted`` begins in ``ids`` at or after ``start``."""
    while True:
        try:
            start = ids.index(wanted[0], start)
        except ValueError:
            return None
        if ids[start : start + len(wanted)] == wanted:
            return start
        start += 1
