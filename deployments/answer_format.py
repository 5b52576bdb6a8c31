"""One model's format of tool calls and thoughts: the parser of an answer, and the grammar that holds it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.tools import ToolUse
from engine.errors import InvalidRequest
from engine.lru import LruCache
from engine.parsers.answer import AnswerParser
from engine.parsers.call_forms import embedded, lark_regex
from engine.parsers.formats import (
    REASONING_TAGS,
    TOOL_FORMATS,
    ToolFormat,
    reasoning_tags_of,
    tool_format_of,
)
from engine.parsers.free_text import FreeTextCalls
from engine.parsers.grammar import (
    SpecialTokens,
    Thought,
    grammar_behind_thought,
    grammar_with_budget,
    tool_grammar,
)
from engine.parsers.reasoning import ReasoningParser, ReasoningTags
from engine.sampling_params import StructuredSpec
from engine.structured.json_schema import LAYOUT
from engine.structured.prepare import checked_schema

#: Most characters of constraints that a format keeps.
_KEPT_CHARACTERS = 16 << 20


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """One model's format of tool calls and thoughts.

    Attributes:
        special: the tokenizer's added tokens.
        tools: the format of calls; None if the chat template shows no tools.
        reasoning: the tags of thoughts; None if the model doesn't think.
        kept: constraints of calls that were made lately.
    """

    special: SpecialTokens
    tools: ToolFormat | None = None
    reasoning: ReasoningTags | None = None
    kept: LruCache[StructuredSpec] = field(
        default_factory=lambda: LruCache(_KEPT_CHARACTERS), init=False, compare=False, repr=False
    )

    def begins_inside(self, prompt: str | None) -> bool:
        """Return whether the prompt has opened a thought."""
        return self.reasoning is not None and self.reasoning.open_in(prompt or "")

    def check(self, use: ToolUse) -> None:
        """Refuse tools that the model wouldn't see.

        Raises:
            InvalidRequest: the chat template shows no tools, so that only a required call can be had.
        """
        if use.choice == "auto" and self.tools is None:
            raise InvalidRequest(
                "This model's chat template shows no tools, so it can't choose one. Serve a model with a "
                "template for tools, set tool_parser in its configuration, or send tool_choice 'required'.",
                param="tools",
            )

    def parser(self, use: ToolUse, prompt: str | None) -> AnswerParser | None:
        """Make the parser of one answer; None where the text is all there is."""
        calls = None
        if use.choice != "none":
            calls = self._calls.parser(use.by_name)
            if use.free:
                calls = FreeTextCalls(calls, use.free)
        reasoning = None
        if self.reasoning is not None:
            reasoning = ReasoningParser(self.reasoning, begins_inside=self.begins_inside(prompt))
        elif calls is not None and self._calls.tags is not None:
            reasoning = ReasoningParser(self._calls.tags, thinks=False)
        if calls is None and reasoning is None:
            return None
        return AnswerParser(
            reasoning,
            calls,
            calls_in_thoughts=self._calls.anywhere,
            trigger="" if calls is None else self._calls.layout.trigger,
        )

    @property
    def _calls(self) -> ToolFormat:
        # A required call is written by the grammar, also where the template shows no tools.
        return self.tools or TOOL_FORMATS["hermes"]

    def constraint(
        self,
        use: ToolUse,
        structured: StructuredSpec | None,
        prompt: str | None,
        thinking_budget: int | None = None,
    ) -> StructuredSpec | None:
        """Return what constrains the answer: calls, or a format, or either of them; each behind a thought,
        which may be bounded.

        Raises:
            InvalidRequest: ``structured`` can't be combined with the rest, or no token, which alone can be
                forced, ends thoughts.
        """
        thought = None
        if self.reasoning is not None:
            if thinking_budget is not None and self.reasoning.end not in self.special.ids:
                raise InvalidRequest(
                    "This model's thoughts can't be bounded: the tokenizer has no token "
                    f"{self.reasoning.end}.",
                    param="thinking_budget",
                )
            thought = Thought(self.reasoning, self.begins_inside(prompt), thinking_budget)
        if use.choice != "none":
            if structured is not None and use.choice == "required" and not structured.is_json:
                raise InvalidRequest(
                    "An answer that must call a tool can't follow another constraint too.",
                    param="tool_choice",
                )
            if structured is None:
                return self._of_calls(use, thought)
            body = _expression(structured)
            if use.choice == "required":
                # There is no text that could have the form. Agents send theirs with every turn.
                return self._of_calls(use, thought)
            # Without a trigger, calls can't be told from an answer of that form; and a grammar can't be
            # embedded in another. Then the form wins, and nothing is called.
            if body is not None and self._calls.layout.trigger:
                return self._of_calls(use, thought, body)
        if thought is None:
            return structured
        if structured is not None:
            body = _expression(structured)
            if body is None:
                return structured
            lark = grammar_behind_thought(body, self.special, thought)
            return StructuredSpec(kind="grammar", text=lark, holds_json=structured.is_json)
        if thinking_budget is not None:
            return StructuredSpec(kind="grammar", text=grammar_with_budget(self.special, thought))
        return None

    def _of_calls(
        self, use: ToolUse, thought: Thought | None, otherwise: str | None = None
    ) -> StructuredSpec:
        """The constraint of an answer that may, or must, call functions. The latest are kept: an agent sends
        the same functions with every turn, and a hundred of them take tens of milliseconds.

        Args:
            otherwise: see :func:`engine.parsers.grammar.tool_grammar`.
        """
        key = use.digest(), thought, otherwise
        kept = self.kept.get(key)
        if kept is None:
            lark = tool_grammar(
                self._calls.layout,
                use.callable(self._calls.layout.form, self.special),
                self.special,
                choice="required" if use.choice == "required" else "auto",
                parallel=use.parallel,
                thought=thought,
                otherwise=otherwise,
            )
            kept = StructuredSpec(kind="grammar", text=lark, holds_json=True)
            self.kept.put(key, kept, len(lark))
        return kept


def _expression(spec: StructuredSpec) -> str | None:
    """A constraint as an expression within a larger grammar; None for grammars, which can't be embedded."""
    if spec.kind == "json_object":
        return embedded({"type": "object"}, LAYOUT)
    if spec.kind == "json_schema":
        return embedded(checked_schema(json.loads(spec.text)), LAYOUT)
    if spec.kind == "choice":
        return (
            "(" + " | ".join(json.dumps(entry, ensure_ascii=False) for entry in json.loads(spec.text)) + ")"
        )
    if spec.kind == "regex":
        return f"/{lark_regex(spec.text)}/"
    return None


def answer_format(
    template: Sequence[str],
    special: SpecialTokens,
    tool_parser: str | None,
    reasoning_parser: str | None,
    thoughts: str | None = None,
) -> AnswerFormat:
    """The format of a model, from the text of its chat templates or as the configuration names it.

    Args:
        tool_parser, reasoning_parser: ``auto`` lets the template tell, ``none`` turns parsing off.
        thoughts: with ``auto``, the tags of the model's family where no template shows any.
    """
    text = "\n".join(template)
    tools = tool_format_of(text) if tool_parser in (None, "auto") else TOOL_FORMATS.get(tool_parser or "")
    if reasoning_parser in (None, "auto"):
        reasoning = reasoning_tags_of(text) or REASONING_TAGS.get(thoughts or "")
    else:
        reasoning = REASONING_TAGS.get(reasoning_parser or "")
    return AnswerFormat(special, tools, reasoning)
