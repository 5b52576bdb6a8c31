"""Chat templates for folders of Mistral that have a tekken.json but no template.

The prompts are those of mistral-common, the publisher's library, which builds them in code by the version
that tekken.json states. Its checks of the order of roles are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from engine.text import tekken

#: Marks as ``@this@`` stand for what versions have differently.
#:
#: Consecutive messages of a user, or of an assistant, are one turn, whose texts are joined by an empty line.
#: Where a turn is one text and one image, the image comes first.
_TEMPLATE = """\
{%- macro texts(content) -%}
  {%- if content is string -%}{{- content -}}{%- else -%}
    {%- set found = (content or []) | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}
    {{- found | select | join('@joint@') -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro result(message) -%}
  @result@
{%- endmacro -%}
{%- set turn = namespace(parts=[], calls=[], asked=[], thoughts='', results=[], start=0, joint='') -%}
{%- set users = namespace(first=-1, last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' and (loop.first or loop.previtem.role != 'user') -%}
    {%- if users.first < 0 -%}{%- set users.first = loop.index0 -%}{%- endif -%}
    {%- set users.last = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
@before@
{{- bos_token -}}
{%- for message in messages -%}
  {%- set role = message.role -%}
  {%- if loop.first or loop.previtem.role != role -%}
    {%- set turn.parts = [] -%}{%- set turn.calls = [] -%}{%- set turn.thoughts = '' -%}
    {%- set turn.results = [] -%}{%- set turn.start = loop.index0 -%}
  {%- endif -%}
  {%- set ends = loop.last or loop.nextitem.role != role -%}
  {%- if role == 'system' -%}
    @system@
  {%- elif role == 'user' or role == 'assistant' -%}
    {%- if message.content is string -%}
      {%- set found = [{'type': 'text', 'text': message.content}] -%}
    {%- else -%}
      {%- set found = message.content or [] -%}
    {%- endif -%}
    {%- set turn.joint = '\\n\\n' -%}
    {%- for part in found if part.type != 'text' or part.text -%}
      {%- if part.type == 'text' and turn.parts and turn.parts[-1].type == 'text' -%}
        {%- set text = turn.parts[-1].text ~ turn.joint ~ part.text -%}
        {%- set turn.parts = turn.parts[:-1] + [{'type': 'text', 'text': text}] -%}
      {%- else -%}
        {%- set turn.parts = turn.parts + [part] -%}
      {%- endif -%}
      {%- if part.type == 'text' -%}{%- set turn.joint = '@joint@' -%}{%- endif -%}
    {%- endfor -%}
    {%- set turn.calls = turn.calls + (message.tool_calls or []) -%}
    @thoughts@
    {%- if ends and role == 'user' -%}
      {%- set parts = turn.parts -%}
      {%- if parts | length == 2 and parts[0].type == 'text' -%}
        {%- set parts = [parts[1], parts[0]] -%}
      {%- endif -%}
      {%- if users.@place@ == turn.start -%}
        {%- if tools -%}
          {{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        @settings@
      {%- endif -%}
      {{- '[INST]' -}}
      @instructions@
      {%- for part in parts -%}
        {{- part.text if part.type == 'text' else '[IMG]' -}}
      {%- endfor -%}
      {{- '[/INST]' -}}
    {%- elif ends -%}
      {%- set text = texts(turn.parts) -%}
      {{- turn.thoughts ~ (text if turn.thoughts else text.rstrip(' ')) -}}
      @calls@
      {%- set turn.asked = turn.calls -%}
      {{- eos_token -}}
    {%- endif -%}
  {%- elif role == 'tool' -%}
    @results@
  {%- else -%}
    {{- raise_exception("the roles are system, user, assistant and tool, not '" ~ role ~ "'") -}}
  {%- endif -%}
{%- endfor -%}
"""
_SYSTEM = "{{- '[SYSTEM_PROMPT]' ~ texts(message.content) ~ '[/SYSTEM_PROMPT]' -}}"
#: All system messages begin the user's last turn.
_GATHERED_SYSTEM = """\
{%- set system = namespace(texts=[]) -%}
{%- for message in messages if message.role == 'system' and message.content -%}
  {%- set system.texts = system.texts + [texts(message.content)] -%}
{%- endfor -%}
"""
_INSTRUCTIONS = """\
{%- if system.texts and users.last == turn.start -%}
  {{- system.texts | join('\\n\\n') ~ '\\n\\n' -}}
{%- endif -%}
"""
_THOUGHTS = """\
{%- if role == 'assistant' and message.reasoning_content -%}
  {%- set turn.thoughts = turn.thoughts ~ '[THINK]' ~ message.reasoning_content ~ '[/THINK]' -%}
{%- endif -%}
"""
#: Calls are named by the last nine characters of their ids, which is all of an id that such a model makes.
_LISTED_CALLS = """\
{%- if turn.calls -%}
  @alone@
  {{- '[TOOL_CALLS][' -}}
  {%- for call in turn.calls -%}
    {{- '{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
    {{- (call.function.arguments | tojson) ~ ', "id": "' ~ (call.id or '')[-9:] ~ '"}' -}}
    {{- ', ' if not loop.last else '' -}}
  {%- endfor -%}
  {{- ']' -}}
{%- endif -%}
"""
_ALONE = "{%- if text -%}{{- raise_exception('a turn has either text or tool calls') -}}{%- endif -%}"
_NAMED_CALLS = """\
{%- for call in turn.calls -%}
  {{- '[TOOL_CALLS]' ~ call.function.name ~ @id@ ~ '[ARGS]' ~ (call.function.arguments | tojson) -}}
{%- endfor -%}
"""
#: The content is a value where it is JSON.
_JSON_RESULT = """\
{{- '[TOOL_RESULTS]{"content": ' ~ (texts(message.content) or '{}') | json_or_text | tojson -}}
{{- ', "call_id": "' ~ (message.tool_call_id or '')[-9:] ~ '"}[/TOOL_RESULTS]' -}}
"""
_NAMED_RESULT = """\
{{- '[TOOL_RESULTS]' ~ (message.tool_call_id or '')[-9:] ~ '[TOOL_CONTENT]' -}}
{{- texts(message.content) ~ '[/TOOL_RESULTS]' -}}
"""
_NAMELESS_RESULT = "{{- '[TOOL_RESULTS]' ~ texts(message.content) ~ '[/TOOL_RESULTS]' -}}"
_AS_THEY_COME = "{{- result(message) -}}"
_IN_ORDER_OF_CALLS = """\
{%- set turn.results = turn.results + [message] -%}
{%- if ends -%}
  {%- set known = turn.asked | map(attribute='id') | list -%}
  {%- for id in known -%}
    {%- for each in turn.results if each.tool_call_id == id -%}{{- result(each) -}}{%- endfor -%}
  {%- endfor -%}
  {%- for each in turn.results if each.tool_call_id not in known -%}{{- result(each) -}}{%- endfor -%}
{%- endif -%}
"""
#: Which effort is one, and which is taken where a request asks for none, is the file's choice.
_SETTINGS = """\
{{- '[MODEL_SETTINGS]{"reasoning_effort": "' ~ effort ~ '"}[/MODEL_SETTINGS]' -}}
"""
_EFFORT = """\
{%- set effort = reasoning_effort or @default@ -%}
{%- if effort not in @efforts@ -%}
  {{- raise_exception('reasoning_effort should be one of ' ~ (@efforts@ | join(', '))) -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class _Version:
    """Texts for the marks of the template; empty by default.

    Attributes:
        calls, result: the calls of a turn, and the result of a tool.
        results: the order of a turn's results.
        place: the turn of the user behind the tools.
        joint: between texts of a message.
    """

    calls: str
    result: str
    results: str = _AS_THEY_COME
    place: str = "last"
    thoughts: str = ""
    before: str = ""
    system: str = _SYSTEM
    instructions: str = ""
    settings: str = ""
    joint: str = "\\n\\n"

    def template(self) -> str:
        text = _TEMPLATE
        for field in fields(self):
            text = text.replace(f"@{field.name}@", getattr(self, field.name))
        return text


_VERSIONS = {
    "v3": _Version(
        _LISTED_CALLS.replace("@alone@", _ALONE),
        _JSON_RESULT,
        before=_GATHERED_SYSTEM,
        system="",
        instructions=_INSTRUCTIONS,
    ),
    "v7": _Version(_LISTED_CALLS.replace("@alone@", ""), _NAMED_RESULT),
    "v11": _Version(
        _NAMED_CALLS.replace("@id@", "'[CALL_ID]' ~ (call.id or '')[-9:]"), _NAMED_RESULT, _IN_ORDER_OF_CALLS
    ),
    "v13": _Version(
        _NAMED_CALLS.replace("~ @id@ ", ""), _NAMELESS_RESULT, _IN_ORDER_OF_CALLS, "first", _THOUGHTS
    ),
}
_VERSIONS["v15"] = replace(_VERSIONS["v13"], joint="")


def mistral_template(folder: Path) -> str | None:
    """Return the Jinja template for a folder's tekken.json; None if it has none, or of an unknown version.

    Raises:
        CheckpointError: tekken.json can't be read.
    """
    file = folder / tekken.FILE
    chat = tekken.chat_format(file) if file.is_file() else None
    if chat is None or chat.version not in _VERSIONS:
        return None
    version = _VERSIONS[chat.version]
    if chat.efforts:
        efforts, default = json.dumps(chat.efforts), json.dumps(chat.default_effort)
        before = _EFFORT.replace("@efforts@", efforts).replace("@default@", default)
        version = replace(version, before=before, settings=_SETTINGS)
    return version.template()
