"""Detects a checkpoint's format of tool calls and of thoughts from its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engine.parsers.call_forms import ATEM_CALL, GLM_CALL, PYTHON_CALL, XML_CALL, json_call
from engine.parsers.events import Parser
from engine.parsers.gemma4 import CALL as GEMMA4_TAG
from engine.parsers.gemma4 import Gemma4Calls
from engine.parsers.gemma4_form import GEMMA4_CALL
from engine.parsers.glm import GlmCalls
from engine.parsers.grammar import CallLayout
from engine.parsers.json_call import JsonCall
from engine.parsers.leading_json import LeadingJsonCalls
from engine.parsers.mistral import MistralCalls
from engine.parsers.muse import CALLS as MUSE_CALLS
from engine.parsers.muse import CALLS_END as MUSE_CALLS_END
from engine.parsers.muse import MuseCalls
from engine.parsers.pythonic import PythonicCalls
from engine.parsers.qwen_xml import QwenXmlCalls
from engine.parsers.reasoning import ReasoningTags
from engine.parsers.tagged import TaggedCalls

Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A family's format of tool calls.

    Attributes:
        name: in the configuration.
        signs: texts that a chat template of the family holds, one of each group.
        parser: makes a parser for one answer, given the JSON schemas of the functions' parameters by name.
        layout: the same format as grammar rules.
        anywhere: whether calls may stand in the middle of a text.
        tags: those of the family's thoughts, where its visible text has tags too, which are special tokens as
            those of calls are.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    parser: Callable[[Schemas], Parser]
    layout: CallLayout
    anywhere: bool = True
    tags: ReasoningTags | None = None


_HERMES_CALL = json_call('\n{"name": "', '", "arguments": ', "}\n</tool_call>")
_LISTED_CALL = json_call('{"name": "', '", "arguments": ', "}")
_INTERNLM_TAGS = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
#: Calls of one answer are numbered.
_COHERE_CALL = replace(
    json_call('", "tool_name": "', '", "parameters": ', "}"),
    lead=json.dumps('{"tool_call_id": "') + " /[0-9]{1,6}/",
)
_COHERE_TAGS = ReasoningTags(
    "<|START_THINKING|>", "<|END_THINKING|>", around=("<|START_RESPONSE|>", "<|END_RESPONSE|>")
)
_MUSE_TAGS = ReasoningTags(
    "to=self<|message|>",
    "<|eom|>",
    around=("<|start|>assistant to=user<|message|>", "<|eom|>"),
    bare="to=user<|message|>",
    again="<|start|>assistant to=self<|message|>",
)
_FENCED = "\n```python\n"

#: The first whose signs a template has is taken, so the more specific formats come first.
TOOL_FORMATS = {
    found.name: found
    for found in (
        ToolFormat(
            "qwen_xml",
            (("<tool_call>",), ("<function=",), ("<parameter=",)),
            QwenXmlCalls,
            CallLayout("<tool_call>", XML_CALL),
        ),
        ToolFormat(
            "glm",
            (("<tool_call>",), ("<arg_key>",), ("<arg_value>",)),
            GlmCalls,
            CallLayout("<tool_call>", GLM_CALL),
        ),
        ToolFormat(
            "hermes",
            (("<tool_call>",),),
            lambda schemas: TaggedCalls(("<tool_call>",), "</tool_call>"),
            CallLayout("<tool_call>", _HERMES_CALL),
        ),
        ToolFormat(
            "mistral_names",
            (("[TOOL_CALLS]",), ("[ARGS]",)),
            lambda schemas: MistralCalls(),
            CallLayout("[TOOL_CALLS]", json_call("", "[ARGS]", "")),
        ),
        ToolFormat(
            "mistral",
            (("[TOOL_CALLS]",),),
            lambda schemas: MistralCalls(),
            CallLayout("[TOOL_CALLS]", _LISTED_CALL, "[", ", ", "]"),
        ),
        ToolFormat(
            "granite",
            (("<|tool_call|>",),),
            lambda schemas: MistralCalls("<|tool_call|>"),
            CallLayout("<|tool_call|>", _LISTED_CALL, "[", ", ", "]"),
        ),
        ToolFormat(
            "gemma4",
            ((GEMMA4_TAG,),),
            lambda schemas: Gemma4Calls(),
            CallLayout(GEMMA4_TAG, GEMMA4_CALL),
        ),
        ToolFormat(
            "cohere",
            (("<|START_ACTION|>",), ("tool_name",)),
            lambda schemas: MistralCalls(
                "<|START_ACTION|>",
                partial(JsonCall, skipped_keys=("tool_call_id",), name_key="tool_name"),
            ),
            CallLayout("<|START_ACTION|>", _COHERE_CALL, "[\n    ", ",\n    ", "\n]<|END_ACTION|>"),
            tags=_COHERE_TAGS,
        ),
        ToolFormat(
            "muse",
            ((MUSE_CALLS,), ("<atem:invoke",)),
            MuseCalls,
            CallLayout(MUSE_CALLS, ATEM_CALL, between="", closing=f"\n{MUSE_CALLS_END}"),
            tags=_MUSE_TAGS,
        ),
        ToolFormat(
            "internlm",
            (("<|action_start|>",), ("<|plugin|>",)),
            lambda schemas: TaggedCalls(_INTERNLM_TAGS, "<|action_end|>"),
            CallLayout(
                "<|action_start|>",
                json_call('<|plugin|>\n{"name": "', '", "parameters": ', "}\n<|action_end|>"),
            ),
        ),
        ToolFormat(
            "minicpm",
            (("<|tool_call_start|>",),),
            lambda schemas: PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>"),
            CallLayout("<|tool_call_start|>", PYTHON_CALL, _FENCED, "\n", "\n```\n<|tool_call_end|>"),
        ),
        ToolFormat(
            "llama_json",
            (("<|python_tag|>", '"parameters"', "ipython"), ("parameters",)),
            lambda schemas: LeadingJsonCalls(),
            CallLayout(
                "",
                json_call('{"name": "', '", "parameters": ', "}"),
                between="; ",
                refused_start=r'[ \t\r\n]*\{[ \t\r\n]*"name"',
            ),
            anywhere=False,
        ),
        ToolFormat(
            "pythonic",
            (("<|python_start|>", "[func_name1(params_name1=params_value1"),),
            lambda schemas: PythonicCalls(),
            CallLayout("", PYTHON_CALL, "[", ", ", "]", refused_start=r"[ \t\r\n]*\[[a-zA-Z0-9_.:-]+\("),
            anywhere=False,
        ),
    )
}

REASONING_TAGS = {
    "think": ReasoningTags("<think>", "</think>"),
    "thinking": ReasoningTags("<thinking>", "</thinking>"),
    "mistral": ReasoningTags("[THINK]", "[/THINK]"),
    "seed": ReasoningTags("<seed:think>", "</seed:think>"),
    "kimi": ReasoningTags("◁think▷", "◁/think▷"),
    "cohere": _COHERE_TAGS,
    "muse": _MUSE_TAGS,
    "gemma4": ReasoningTags("<|channel>", "<channel|>", "thought\n"),
}


def tool_format_of(template: str) -> ToolFormat | None:
    """The format whose signs stand in a chat template; None if the template writes no calls."""
    for found in TOOL_FORMATS.values():
        if all(any(sign in template for sign in group) for group in found.signs):
            return found
    return None


def reasoning_tags_of(template: str) -> ReasoningTags | None:
    """The tags of thoughts that a chat template speaks of; None if it speaks of none."""
    return next((tags for tags in REASONING_TAGS.values() if tags.end in template), None)
