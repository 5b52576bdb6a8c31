"""Grammars that hold tool calls to their schemas while the text around them stays free.

The grammars are written in llguidance's dialect of Lark: ``%json`` embeds a JSON schema, ``<[ids]>`` stands
for special tokens, which no text can match, and ``[lazy]`` ends a lexeme at its first match.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.parsers.reasoning import ReasoningTags

CHUNK = r"/(.|\n)+/"


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A function that may be called.

    Attributes:
        name: of the function.
        parameters: JSON schema of its arguments, an object.
    """

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that a tokenizer adds to its vocabulary: no text in a Lark grammar stands for them.

    Attributes:
        ids: token id by text.
        ends: ids that end an answer.
    """

    ids: Mapping[str, int]
    ends: frozenset[int]

    def literal(self, text: str) -> str:
        """``text`` as a grammar's expression, with special tokens where the text spells them."""
        parts, rest = [], text
        while rest:
            found = [(rest.find(name), -len(name), name) for name in self.ids if name and name in rest]
            position, _, name = min(found) if found else (len(rest), 0, "")
            if position:
                parts.append(json.dumps(rest[:position], ensure_ascii=False))
            if name:
                parts.append(f"<[{self.ids[name]}]>")
            rest = rest[position + len(name) :]
        return " ".join(parts)

    def others(self, *texts: str) -> str | None:
        """Any special token but those of ``texts`` and those that end an answer; None if there is none."""
        barred = {self.ids[text] for text in texts if text in self.ids} | self.ends
        allowed = sorted(set(self.ids.values()) - barred)
        return f"<[{','.join(map(str, allowed))}]>" if allowed else None


@dataclass(slots=True)
class Rules:
    """Rules of a grammar under construction."""

    special: SpecialTokens
    lines: list[str] = field(default_factory=list)

    def add(self, name: str, expression: str) -> str:
        """Define a rule or terminal; returns its name without attributes."""
        self.lines.append(f"{name}: {expression}")
        return name.partition("[")[0]


@dataclass(frozen=True, slots=True)
class CallForm:
    """The syntax of one call.

    Attributes:
        head: the text before the arguments, given the function's name.
        arguments: defines the arguments and the text behind them, given a number that no other function has;
            returns the expression that stands for both.
    """

    head: Callable[[str], str]
    arguments: Callable[[Rules, ToolSchema, int], str]


@dataclass(frozen=True, slots=True)
class CallLayout:
    """A family's arrangement of calls within an answer.

    Attributes:
        trigger: text that begins calls wherever it stands; empty where calls stand at the answer's beginning.
        form: of one call.
        opening: text before the first call, behind the trigger.
        between: text between two calls of one block; None where each call begins with the trigger.
        closing: text behind the last call.
        refused_start: for calls at the beginning, a regular expression of the beginnings that no other text
            may have. Every first call's head must match it at its end, not sooner.
    """

    trigger: str
    form: CallForm
    opening: str = ""
    between: str | None = None
    closing: str = ""
    refused_start: str = ""


def tool_grammar(
    layout: CallLayout,
    tools: Sequence[ToolSchema],
    special: SpecialTokens,
    *,
    choice: Literal["auto", "required"],
    parallel: bool = True,
    reasoning: ReasoningTags | None = None,
    begins_inside: bool = False,
) -> str:
    """The Lark grammar of an answer that may, or must, call some of ``tools``.

    Args:
        choice: ``required`` asks for at least one call and allows no text but a thought.
        parallel: whether several calls may stand in one answer.
        reasoning: tags of thoughts, which may come first.
        begins_inside: the prompt has opened the thought.
    """
    rules = Rules(special)
    if choice == "required":
        lead = _lead(rules, reasoning, begins_inside)
        start = f"{lead} {_required(rules, layout, tools, parallel)}".strip()
    elif layout.trigger:
        start = _text_with_calls(rules, layout, tools, parallel)
    else:
        start = _text_or_calls(rules, layout, tools, parallel)
        if reasoning is not None:
            start = f"{_thought(rules, reasoning, begins_inside)} ({start})"
    return _grammar(start, rules)


def _grammar(start: str, rules: Rules) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines, ""])


def grammar_behind_thought(
    body: str, special: SpecialTokens, reasoning: ReasoningTags, *, begins_inside: bool
) -> str:
    """The Lark grammar of a thought and ``body``, an expression such as ``%json {...}``, behind it."""
    rules = Rules(special)
    start = f"{_lead(rules, reasoning, begins_inside)} {body}"
    return _grammar(start, rules)


def grammar_with_budget(
    special: SpecialTokens, reasoning: ReasoningTags, budget: int, *, begins_inside: bool
) -> str:
    """The Lark grammar of a thought of at most ``budget`` tokens between its tags, and any text behind it.

    Raises:
        ValueError: the tokenizer has no token for the end tag, which alone can be forced.
    """
    if reasoning.end not in special.ids:
        raise ValueError(f"the tokenizer has no token {reasoning.end}")
    rules = Rules(special)
    inner = ""
    if budget:
        inner = "inner"
        rules.add(f"inner[max_tokens={budget}]", r"/(.|\n)*/")
    opening = "" if begins_inside else special.literal(reasoning.start)
    thought = f"{opening} {inner} {special.literal(reasoning.end)}".strip()
    rules.add("CHUNK", CHUNK)
    text = f"({' | '.join(filter(None, ['CHUNK', special.others(reasoning.start)]))})*"
    return _grammar(f"{thought} {text}" if begins_inside else f"{thought} {text} | {text}", rules)


def _block(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    """One block of calls behind its trigger."""
    literal = rules.special.literal
    call = _call(rules, layout, tools)
    return rules.add(
        "block", f"{literal(layout.opening)} {call} {_behind_call(rules, layout, parallel)}".strip()
    )


def _call(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema]) -> str:
    forms = [
        f"{rules.special.literal(layout.form.head(tool.name))} {layout.form.arguments(rules, tool, index)}"
        for index, tool in enumerate(tools)
    ]
    return rules.add("call", " | ".join(forms))


def _behind_call(rules: Rules, layout: CallLayout, parallel: bool) -> str:
    """Return the grammar expression for the text after the first call of a block."""
    literal = rules.special.literal
    more = f"({literal(layout.between)} call)* " if parallel and layout.between is not None else ""
    return f"{more}{literal(layout.closing)}".strip()


def _required(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    """Blocks of calls, one or many, with nothing but white space between them."""
    block = f"{rules.special.literal(layout.trigger)} {_block(rules, layout, tools, parallel)}".strip()
    if not parallel or not layout.trigger or layout.between is not None:
        return block
    gap = rules.add("GAP", r"/[ \t\r\n]{0,4}/")
    return f"{block} ({gap} {block})*"


def _text_with_calls(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    calls = _block(rules, layout, tools, parallel)
    rules.add("CHUNK", CHUNK)
    tokens = rules.special.others(layout.trigger)
    if layout.trigger in rules.special.ids:
        text = rules.add("text", f"({' | '.join(filter(None, ['CHUNK', tokens]))})*")
        block = f"{rules.special.literal(layout.trigger)} {calls}"
        return f"{text} ({block} {text})*" if parallel else f"{text} ({block})?"
    # The trigger is plain text: the lexeme that holds it ends at its first appearance.
    head = rules.add("head[lazy]", f"/(.|\\n)*/ {json.dumps(layout.trigger, ensure_ascii=False)}")
    parts = [f"{head} {calls}", *([f"CHUNK? {tokens}"] if tokens else [])]
    if parallel:
        return f"({' | '.join(parts)})* CHUNK?"
    apart = f"(CHUNK? {tokens})*" if tokens else ""
    return f"{apart} (CHUNK? | {head} {calls})"


def _text_or_calls(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    """Calls from the beginning, or a text that doesn't begin like them.

    The lexer follows a text and a call side by side until one of them is excluded, and forgets lexemes that
    ended sooner. So the whole head of the first call is one lexeme.
    """
    _call(rules, layout, tools)
    first = [
        f"{rules.add(f'FIRST_{index}', _terminal(layout.opening + layout.form.head(tool.name)))} "
        f"{layout.form.arguments(rules, tool, len(tools) + index)}"
        for index, tool in enumerate(tools)
    ]
    plain = rules.add("PLAIN", f"{CHUNK} & ~/{layout.refused_start}(.|\\n)*/")
    tokens = rules.special.others()
    rules.add("CHUNK", CHUNK)
    more = f" ({tokens} CHUNK?)*" if tokens else ""
    return f"({' | '.join(first)}) {_behind_call(rules, layout, parallel)} | {plain}?{more}"


def _terminal(text: str) -> str:
    return f"/[ \\t\\r\\n]*/ {json.dumps(text, ensure_ascii=False)}"


def _lead(rules: Rules, reasoning: ReasoningTags | None, begins_inside: bool) -> str:
    """A thought, where the family thinks, and a little white space behind it."""
    if reasoning is None:
        return ""
    space = rules.add("SPACE", r"/[ \t\r\n]{0,4}/")
    thought = _thought(rules, reasoning, begins_inside)
    return f"{thought} {space}" if begins_inside else f"{space} ({thought} {space})?"


def _thought(rules: Rules, reasoning: ReasoningTags, begins_inside: bool) -> str:
    """A thought with its tags; optional unless the prompt has opened it."""
    special = rules.special
    tokens = special.others(reasoning.end)
    inner = rules.add("THOUGHT", CHUNK)
    if reasoning.end in special.ids:
        body = f"({' | '.join(filter(None, [inner, tokens]))})* {special.literal(reasoning.end)}"
    else:
        ended = rules.add("thought_end[lazy]", f"/(.|\\n)*/ {json.dumps(reasoning.end, ensure_ascii=False)}")
        body = f"({inner}? {tokens})* {ended}" if tokens else ended
    if begins_inside:
        return rules.add("thought", body)
    return rules.add("thought", f"{special.literal(reasoning.start)} {body}")
