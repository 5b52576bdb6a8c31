"""Grammars that hold tool calls to their schemas while the text around them stays free.

The grammars are written in llguidance's dialect of Lark: ``%json`` embeds a JSON schema, ``<[ids]>`` stands
for special tokens, which no text can match, and ``[lazy]`` ends a lexeme at its first match.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.parsers.arguments import refused
from engine.parsers.lark_input import TextForm, lark_input
from engine.parsers.reasoning import ReasoningTags

CHUNK = r"/(.|\n)+/"

#: Characters of the rules of one grammar: none may be longer.
_MOST_WRITTEN = 256 * 1024


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A function that may be called.

    Attributes:
        name: of the function.
        parameters: JSON schema of its arguments, an object.
        lark: a grammar of its only argument, a text; None where the schema says all.
    """

    name: str
    parameters: Mapping[str, Any]
    lark: str | None = None


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


@dataclass(frozen=True, slots=True)
class Thought:
    """The thought that an answer may begin with.

    Attributes:
        tags: around it.
        begins_inside: the prompt has opened it.
        budget: the most tokens between its tags; None if there is no bound. A bound needs a token that ends
            the thought: text can't be forced.
    """

    tags: ReasoningTags
    begins_inside: bool = False
    budget: int | None = None


@dataclass(slots=True)
class Rules:
    """Rules of a grammar under construction.

    Attributes:
        left_out: keywords of schemas that the rules don't hold to.
        written: characters, and what else was spent.
    """

    special: SpecialTokens
    lines: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    written: int = 0

    def add(self, name: str, expression: str) -> str:
        """Define a rule or terminal; returns its name without attributes. Errors as :meth:`spend`."""
        self.lines.append(f"{name}: {expression}")
        self.spend(len(self.lines[-1]))
        return name.partition("[")[0]

    def spend(self, characters: int) -> None:
        """Note work that is worth so many characters of the grammar.

        Raises:
            InvalidRequest: together it is more than a grammar may hold.
        """
        self.written += characters
        if self.written > _MOST_WRITTEN:
            raise refused("calls by it take a grammar that is too large; use less of anyOf, or fewer tools")

    def leave_out(self, schema: Mapping[str, Any], *keywords: str) -> None:
        """Note those of ``keywords`` that ``schema`` has: the rules don't hold to them."""
        self.left_out.update(schema.keys() & set(keywords))


@dataclass(frozen=True, slots=True)
class CallForm:
    """The syntax of one call.

    Attributes:
        head: the text before the arguments, given the function's name.
        arguments: defines the arguments and the text behind them, given a number that no other function has;
            returns the expression that stands for both.
        text: how the call of a function of one text holds that.
        lead: an expression before the head; only for layouts with a trigger.
    """

    head: Callable[[str], str]
    arguments: Callable[[Rules, ToolSchema, int], str]
    text: TextForm
    lead: str = ""

    def behind_head(self, rules: Rules, tool: ToolSchema, number: int) -> str:
        """:attr:`arguments`, or those of a function that takes a text by a grammar.

        Raises:
            InvalidRequest: the function's schema or grammar can't be followed.
        """
        if tool.lark is None:
            return self.arguments(rules, tool, number)
        form, literal = self.text, rules.special.literal
        by_token = form.closing in rules.special.ids and form.after.startswith(form.closing or "")
        text = lark_input(tool.lark, form, ends_by_token=by_token)
        after = [form.after]
        if form.closing is not None and form.after[0] not in form.closing:
            # A text may hold this character, and is told from the call's end only by what comes behind it.
            after = [form.after[0], form.after[1:]]
        return " ".join([literal(form.before), text, *map(literal, after)]).strip()

    def left_out(self, tool: ToolSchema, rules: Rules) -> list[str]:
        """The keywords of a function's schema that calls aren't held to, in alphabetical order.

        Args:
            rules: for a trial of all functions, which is no larger than their grammar may be.
        """
        rules.left_out.clear()
        rules.spend(len(self.behind_head(rules, tool, 0)))
        return sorted(rules.left_out)


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
    thought: Thought | None = None,
    otherwise: str | None = None,
) -> str:
    """The Lark grammar of an answer that may, or must, call some of ``tools``.

    Args:
        choice: ``required`` asks for at least one call and allows no text but a thought.
        parallel: whether several calls may stand in one answer.
        thought: may come first.
        otherwise: an expression, such as ``%json {...}``: what the answer is if it calls nothing. Then calls
            have no text around them.
    """
    rules = Rules(special)
    if choice == "required" or otherwise is not None:
        lead = _lead(rules, thought, layout.trigger)
        calls = _required(rules, layout, tools, parallel)
        if otherwise is not None and thought is not None:
            otherwise = _within_tags(rules, thought, otherwise)
        start = f"{lead} {calls if otherwise is None else f'({calls} | {otherwise})'}".strip()
    elif layout.trigger:
        start = _text_with_calls(rules, layout, tools, parallel, thought)
    else:
        start = _text_or_calls(rules, layout, tools, parallel)
        if thought is not None:
            start = f"{_thought(rules, thought)} ({start})"
    return _grammar(start, rules)


def _grammar(start: str, rules: Rules) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines, ""])


def grammar_behind_thought(body: str, special: SpecialTokens, thought: Thought) -> str:
    """The Lark grammar of a thought and ``body``, an expression such as ``%json {...}``, behind it."""
    rules = Rules(special)
    return _grammar(f"{_lead(rules, thought)} {_within_tags(rules, thought, body)}", rules)


def _within_tags(rules: Rules, thought: Thought, body: str) -> str:
    """``body`` with the tags that the family writes around a visible text, which may be missing."""
    around = thought.tags.around
    if not around:
        return body
    start, end = (rules.special.literal(tag) for tag in around)
    return f"(({start})? {body} ({end})?)"


def grammar_with_budget(special: SpecialTokens, thought: Thought) -> str:
    """The Lark grammar of a bounded thought and any text behind it."""
    rules = Rules(special)
    rules.add("CHUNK", CHUNK)
    tokens = special.others(thought.tags.start)
    return _grammar(f"{_before_text(rules, thought)} ({' | '.join(filter(None, ['CHUNK', tokens]))})*", rules)


def _block(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    """One block of calls behind its trigger."""
    literal = rules.special.literal
    call = _call(rules, layout, tools)
    return rules.add(
        "block", f"{literal(layout.opening)} {call} {_behind_call(rules, layout, parallel)}".strip()
    )


def _call(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema]) -> str:
    form, literal = layout.form, rules.special.literal
    # Each is a rule of its own, so that too many are noticed before all of them are written.
    forms = [
        rules.add(
            f"call_{index}",
            f"{form.lead} {literal(form.head(tool.name))} {form.behind_head(rules, tool, index)}".strip(),
        )
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


def _text_with_calls(
    rules: Rules,
    layout: CallLayout,
    tools: Sequence[ToolSchema],
    parallel: bool,
    thought: Thought | None,
) -> str:
    calls = _block(rules, layout, tools, parallel)
    rules.add("CHUNK", CHUNK)
    # A thought is a part of the text, unless it has a bound.
    bounded = thought is not None and thought.budget is not None
    opened = (thought.tags.start,) if thought is not None and bounded else ()
    before = _before_text(rules, thought, layout.trigger) if thought is not None and bounded else ""
    tokens = rules.special.others(layout.trigger, *opened)
    if layout.trigger in rules.special.ids:
        text = rules.add("text", f"({' | '.join(filter(None, ['CHUNK', tokens]))})*")
        block = f"{rules.special.literal(layout.trigger)} {calls}"
        return f"{before} {text} " + (f"({block} {text})*" if parallel else f"({block})?")
    # The trigger is plain text: the lexeme that holds it ends at its first appearance.
    head = rules.add("head[lazy]", f"/(.|\\n)*/ {json.dumps(layout.trigger, ensure_ascii=False)}")
    parts = [f"{head} {calls}", *([f"CHUNK? {tokens}"] if tokens else [])]
    if parallel:
        return f"{before} ({' | '.join(parts)})* CHUNK?"
    apart = f"(CHUNK? {tokens})*" if tokens else ""
    return f"{before} {apart} (CHUNK? | {head} {calls})"


def _before_text(rules: Rules, thought: Thought, trigger: str = "") -> str:
    """A bounded thought before a text that can't open one."""
    found = _thought(rules, thought, trigger)
    return found if thought.begins_inside else f"({found})?"


def _text_or_calls(rules: Rules, layout: CallLayout, tools: Sequence[ToolSchema], parallel: bool) -> str:
    """Calls from the beginning, or a text that doesn't begin like them.

    The lexer follows a text and a call side by side until one of them is excluded, and forgets lexemes that
    ended sooner. So the whole head of the first call is one lexeme.
    """
    _call(rules, layout, tools)
    first = [
        f"{rules.add(f'FIRST_{index}', _terminal(layout.opening + layout.form.head(tool.name)))} "
        f"{layout.form.behind_head(rules, tool, len(tools) + index)}"
        for index, tool in enumerate(tools)
    ]
    plain = rules.add("PLAIN", f"{CHUNK} & ~/{layout.refused_start}(.|\\n)*/")
    tokens = rules.special.others()
    rules.add("CHUNK", CHUNK)
    more = f" ({tokens} CHUNK?)*" if tokens else ""
    return f"({' | '.join(first)}) {_behind_call(rules, layout, parallel)} | {plain}?{more}"


def _terminal(text: str) -> str:
    return f"/[ \\t\\r\\n]*/ {json.dumps(text, ensure_ascii=False)}"


def _lead(rules: Rules, thought: Thought | None, trigger: str = "") -> str:
    """A thought, where the family thinks, and a little white space behind it."""
    if thought is None:
        return ""
    space = rules.add("SPACE", r"/[ \t\r\n]{0,4}/")
    found = _thought(rules, thought, trigger)
    return f"{found} {space}" if thought.begins_inside else f"{space} ({found} {space})?"


def _thought(rules: Rules, thought: Thought, trigger: str = "") -> str:
    """A thought with its tags, of which the prompt may have opened the first.

    Args:
        trigger: of calls, which a bounded thought can't hold.
    """
    special, end = rules.special, thought.tags.end
    tokens = special.others(end)
    if thought.budget is not None:
        body = f"{_bounded(rules, thought.budget, trigger)} {special.literal(end)}".strip()
    elif end in special.ids:
        inner = rules.add("THOUGHT", CHUNK)
        body = f"({' | '.join(filter(None, [inner, tokens]))})* {special.literal(end)}"
    else:
        inner = rules.add("THOUGHT", CHUNK)
        ended = rules.add("thought_end[lazy]", f"/(.|\\n)*/ {json.dumps(end, ensure_ascii=False)}")
        body = f"({inner}? {tokens})* {ended}" if tokens else ended
    if thought.begins_inside:
        return rules.add("thought", body)
    return rules.add("thought", f"{special.literal(thought.tags.start + thought.tags.label)} {body}")


def _bounded(rules: Rules, budget: int, trigger: str) -> str:
    """Text of at most ``budget`` tokens without the ``trigger``. No special token is text."""
    if not budget:
        return ""
    text = r"/(.|\n)*/"
    if trigger and trigger not in rules.special.ids:
        quoted = json.dumps(trigger, ensure_ascii=False)
        text = rules.add("UNCALLED", f"{text} & ~({text} {quoted} {text})")
    return rules.add(f"inner[max_tokens={budget}]", text)
