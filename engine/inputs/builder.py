"""Builds EngineInput from chat messages, a text or token ids, and the media that belong to them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from engine.errors import InvalidRequest
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import Family
from engine.inputs.assembly import Expand, PromptAssembly, assemble_ids, match_items
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.content_form import ContentForms
from engine.inputs.control_text import ControlText, StandIns
from engine.inputs.pages import spread
from engine.inputs.placeholders import Placeholders
from engine.prompt import (
    EngineInput,
    MediaItem,
    MediaPart,
    Message,
    PagesItem,
    PlaceholderRun,
    TextPart,
)
from engine.text.tokenizer import Tokenizer

_NOTHING = StandIns({})


class PromptBuilder:
    """Builds the prompts of one model. Thread-safe.

    In a chat, placeholder strings count only where the template put them: control strings that a message
    contains are tokenised as plain text. In a raw prompt they count wherever its author put them.

    Args:
        tokenizer: the model's tokenizer.
        template: the chat template; None if there is none.
        prompt_format: the family's placeholder strings.
        expand: gives the token runs of an item; ``item.placeholder`` if not given.
        around: gives the texts around an item's placeholder string; none if not given.
        mark_text: gives what replaces the format's ``video_mark`` of a video; nothing is if not given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        prompt_format: PromptFormat,
        expand: Expand | None = None,
        around: Callable[[MediaItem], tuple[str, str]] | None = None,
        mark_text: Callable[[MediaItem], str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._format = prompt_format
        self._expand = expand or (lambda item, index: item.placeholder)
        self._around = around or (lambda item: ("", ""))
        self._mark_text = mark_text or (lambda item: prompt_format.video_mark)
        self._mark = re.escape(prompt_format.video_mark)
        self._placeholders = Placeholders(prompt_format, tokenizer)
        patterns = [*self._placeholders.patterns, *([self._mark] if self._mark else [])]
        self._control = ControlText(tokenizer, patterns)
        self._forms: ContentForms | None = None
        if template is not None:
            self._forms = ContentForms(template, self._placeholders, prompt_format.separator)

    @classmethod
    def for_model(
        cls, family: Family, config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> PromptBuilder:
        """Make the builder of a family's checkpoint."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def expand(item: MediaItem, index: int) -> tuple[PlaceholderRun, ...]:
            return family.placeholder(config, item, index, encode)

        return cls(
            tokenizer,
            template,
            family.prompt_format(config),
            expand,
            partial(family.around, config),
            partial(family.video_mark_text, config),
        )

    def with_template(self, template: str | Path) -> PromptBuilder:
        """Make the same builder with another chat template: a file, or Jinja text.

        For the owner of the process only: a template from a request must not come here.

        Raises:
            ConfigError: it is neither, or doesn't parse.
        """
        other = ChatTemplate.load("", self.tokenizer.config, template)
        return PromptBuilder(self.tokenizer, other, self._format, self._expand, self._around, self._mark_text)

    @property
    def thoughts(self) -> str | None:
        """The family's tags of thoughts; see :class:`~engine.families.base.PromptFormat`."""
        return self._format.thoughts

    def from_messages(
        self,
        messages: Sequence[Message],
        items: Sequence[MediaItem | PagesItem] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
    ) -> EngineInput:
        """Build a conversation's prompt: the ids of Transformers' ``apply_chat_template``, media expanded.

        Args:
            messages: as :func:`engine.inputs.messages.parse_messages` gives them.
            items: the media, by the index that the messages' :class:`MediaPart` carry. Pages stand as images
                in their document's place.

        Raises:
            InvalidRequest: there is no template, it refuses the messages, something is nested too deeply, or
                the placeholders that it prints don't fit the items.
        """
        if not isinstance(template_kwargs, Mapping | None):
            raise InvalidRequest(
                "chat_template_kwargs must hold the template's variables by name.",
                param="chat_template_kwargs",
            )
        self.check_messages(messages, len(items))
        messages, items = spread(messages, items)
        in_order = [
            part.index for message in messages for part in message.parts if isinstance(part, MediaPart)
        ]
        try:
            text, stand_ins = self._rendered(
                messages,
                list(tools or ()),
                dict(template_kwargs or {}),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except RecursionError:
            raise InvalidRequest(
                "A tool, the arguments of a call or an option of the template is nested too deeply.",
                param="messages",
            ) from None
        bos = self.tokenizer.token_text("bos_token")
        add_special = bool(self._placeholders.kinds) and not (bos and text.startswith(bos))
        return self._build(text, stand_ins, [items[i] for i in in_order], add_special, cache_salt, "messages")

    def _rendered(
        self, messages: Sequence[Message], tools: list[Any], options: dict[str, Any], **generation: bool
    ) -> tuple[str, StandIns]:
        """Return the chat template's text, and the characters in it that stand for control strings."""
        assert self.template is not None and self._forms is not None
        with_tools = bool(tools)
        protected, stand_ins = self._control.protect(
            [_written(message) for message in messages], tools, options
        )
        conversation = [
            self._protected(message, texts, with_tools)
            for message, texts in zip(messages, protected[0], strict=True)
        ]
        text = self.template.render(
            self._forms.arrange(conversation, with_tools=with_tools),
            tools=protected[1] or None,
            options=protected[2],
            **generation,
        )
        return text, stand_ins

    def from_text(
        self,
        prompt: str,
        items: Sequence[MediaItem] = (),
        *,
        add_special_tokens: bool = True,
        cache_salt: str = "",
        placeholders_are_text: bool = False,
    ) -> EngineInput:
        """Build a finished prompt with one placeholder string for each item of each kind, in order.

        Args:
            placeholders_are_text: placeholder strings in the prompt are plain text; for prompts that never
                bring media.

        Raises:
            InvalidRequest: the placeholder strings don't fit the items.
        """
        text, stand_ins = prompt, _NOTHING
        if placeholders_are_text:
            text, stand_ins = self._control.protect_placeholders(prompt)
        return self._build(text, stand_ins, items, add_special_tokens, cache_salt, "prompt")

    def truncated(
        self,
        built: EngineInput,
        most: int,
        side: Literal["left", "right"] | None,
        *,
        add_special_tokens: bool,
    ) -> EngineInput:
        """A prompt without media, cut to ``most`` tokens; those that the tokenizer puts around a text stay.

        Args:
            side: where it is cut; None takes the tokenizer's own.
            add_special_tokens: as ``built`` was made: False for token ids.

        Raises:
            InvalidRequest: that leaves no token of the text.
        """
        special = add_special_tokens and self._format.adds_special
        around = len(self.tokenizer.with_special_tokens([])) if special else 0
        if most <= around:
            raise InvalidRequest(
                f"Of {most} tokens none is left for the text: the tokenizer puts {around} around it.",
                param="prompt",
            )
        cut = self.tokenizer.truncated(built.token_ids, most, side, special=special)
        return replace(built, token_ids=cut)

    def from_token_ids(
        self, ids: Sequence[int], items: Sequence[MediaItem] = (), *, cache_salt: str = ""
    ) -> EngineInput:
        """Build a tokenised prompt; :func:`~engine.inputs.assembly.assemble_ids` says where media may stand.

        Raises:
            InvalidRequest: an item has no place in the ids, or an id is no integer.
        """
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError:
            raise InvalidRequest("Token ids must be a list of integers.", param="prompt_token_ids") from None
        known = self._format.video_prefix or self._format.video_behind

        def is_video(item: MediaItem, start: int) -> bool:
            before = known or self._around(item)[0]
            # Each of its tokens has at least a byte.
            return self.tokenizer.decode(ids[max(0, start - len(before) - 1) : start]).endswith(before)

        def around(item: MediaItem) -> tuple[list[int], list[int]]:
            before, behind = self._around(item)
            if item.kind == "video":
                before = self._format.video_prefix + before
            return self.tokenizer.encode_piece(before), self.tokenizer.encode_piece(behind)

        built = assemble_ids(
            ids, items, self._placeholders, self._expand, "prompt_token_ids", is_video, around
        )
        return EngineInput(built.ids, built.spans, None, cache_salt)

    def check_messages(self, messages: Sequence[Message], num_items: int) -> None:
        """Refuse messages before their ``num_items`` media are fetched.

        Raises:
            InvalidRequest: there is no template, or the messages don't fit the model or the number of media.
        """
        if self.template is None:
            raise InvalidRequest(
                "This model has no chat template. Set chat_template to a Jinja file for it when the model is "
                "loaded, or give a finished prompt instead of messages.",
                param="messages",
            )
        if not messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        media = [part for message in messages for part in message.parts if isinstance(part, MediaPart)]
        if sorted(part.index for part in media) != list(range(num_items)):
            raise InvalidRequest(
                f"The messages refer to {len(media)} media items, but {num_items} were given.",
                param="messages",
            )
        for part in media:
            kind = "image" if part.kind == "document" else part.kind
            if kind not in self._placeholders.kinds:
                raise InvalidRequest(f"This model takes no {part.kind}s.", param="messages")

    def _protected(self, message: Message, protected: Mapping[str, Any], with_tools: bool) -> Message:
        """The message with its strings replaced by the protected ones, in a role that the template knows."""
        assert self._forms is not None
        texts = iter(protected["content"])
        parts = [
            TextPart(next(texts)["text"]) if isinstance(part, TextPart) else part for part in message.parts
        ]
        role = message.role
        if role == "developer" and not self._forms.takes_developer(with_tools=with_tools):
            role = "system"
        extra = {key: value for key, value in protected.items() if key != "content"}
        return Message(role, parts, extra, message.form)

    def _build(
        self,
        text: str,
        stand_ins: StandIns,
        items: Sequence[MediaItem],
        add_special: bool,
        cache_salt: str,
        param: str,
    ) -> EngineInput:
        """Tokenise a rendered prompt and expand its placeholder strings."""
        built = PromptAssembly(items, self._expand)
        add_special = add_special and self._format.adds_special
        if not text.startswith(self._format.start):
            text = self._format.start + text
        if self._format.video is not None and self._format.video_prefix:
            text = text.replace(self._format.video, self._format.video_prefix + self._format.video)
        if self._mark:
            text = self._marked(text, items)
        if items:
            text = self._placeholders.surrounded(text, partial(self._texts_around, items))
        if self._placeholders.split:
            self._add_pieces(built, text, stand_ins, items, add_special, param)
        else:
            ids = self._control.encode(text, stand_ins, add_special_tokens=add_special)
            kinds = {token: kind for kind, token in self._placeholders.ids.items()}
            places = [place for place, token in enumerate(ids) if token in kinds]
            found = [(kinds[ids[place]], None) for place in places]
            start = 0
            for place, index in zip(
                places, match_items(found, items, self._placeholders, param), strict=True
            ):
                built.add_ids(ids[start:place])
                built.add_item(index)
                start = place + 1
            built.add_ids(ids[start:])
        return EngineInput(built.ids, built.spans, stand_ins.restore(text), cache_salt)

    def _marked(self, text: str, items: Sequence[MediaItem]) -> str:
        """``text`` with what is written of each video; marks beyond the last video stay."""
        videos = (item for item in items if item.kind == "video")

        def written(match: re.Match[str]) -> str:
            video = next(videos, None)
            return match.group() if video is None else self._mark_text(video)

        return re.sub(self._mark, written, text)

    def _texts_around(self, items: Sequence[MediaItem], kind: str, number: int) -> tuple[str, str]:
        """The texts around the placeholder string of a kind's ``number``-th item, from 0. Without such an
        item, which is reported later, there are none."""
        of_kind = [item for item in items if item.kind == kind]
        return self._around(of_kind[number]) if number < len(of_kind) else ("", "")

    def _add_pieces(
        self,
        built: PromptAssembly,
        text: str,
        stand_ins: StandIns,
        items: Sequence[MediaItem],
        add_special: bool,
        param: str,
    ) -> None:
        """Add a prompt whose placeholder strings are no tokens: tokenised piece by piece around them."""
        pieces, found = self._placeholders.split_text(text)
        indices: Iterator[int] = iter(match_items(found, items, self._placeholders, param))
        each = self._format.split_at_media
        if add_special and not each:
            built.add_ids(self.tokenizer.special_prefix)
        for number, piece in enumerate(pieces):
            if number:
                built.add_item(next(indices))
            built.add_ids(
                self._control.encode(
                    piece,
                    stand_ins,
                    add_special_tokens=add_special and each,
                    at_start=each or number == 0,
                )
            )
        if add_special and not each:
            built.add_ids(self.tokenizer.special_suffix)


def _written(message: Message) -> dict[str, Any]:
    """The strings of a message that a caller wrote, as JSON."""
    texts = [{"text": part.text} for part in message.parts if isinstance(part, TextPart)]
    return {**message.extra, "content": texts}
