"""Chat templates for folders of Mistral that have a tekken.json but no template.

The prompts are those of mistral-common, the publisher's library, which builds them in code by the version
that tekken.json states. Its checks of the order of roles are left out.
"""

from __future__ import annotations

from pathlib import Path

from engine.text import tekken

#: Consecutive messages of a user, or of an assistant, are one turn, whose texts are joined by an empty line.
#: Where a turn is one text and one image, the image comes first.
_START = """\
{%- macro texts(content) -%}
  {%- if content is string -%}{{- content -}}{%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set turn = namespace(parts=[], calls=[], thoughts='') -%}
{%- set users = namespace(first=-1, last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' and (loop.first or loop.previtem.role != 'user') -%}
    {%- if users.first < 0 -%}{%- set users.first = loop.index0 -%}{%- endif -%}
    {%- set users.last = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set role = message.role -%}
  {%- if loop.first or loop.previtem.role != role -%}
    {%- set turn.parts = [] -%}{%- set turn.calls = [] -%}{%- set turn.thoughts = '' -%}
  {%- endif -%}
  {%- set ends = loop.last or loop.nextitem.role != role -%}
  {%- if role == 'system' -%}
    {{- '[SYSTEM_PROMPT]' ~ texts(message.content) ~ '[/SYSTEM_PROMPT]' -}}
"""
_TURNS = """\
  {%- elif role == 'user' or role == 'assistant' -%}
    {%- if message.content is string -%}
      {%- set found = [{'type': 'text', 'text': message.content}] if message.content else [] -%}
    {%- else -%}
      {%- set found = message.content or [] -%}
    {%- endif -%}
    {%- for part in found -%}
      {%- if part.type == 'text' and turn.parts and turn.parts[-1].type == 'text' -%}
        {%- set text = turn.parts[-1].text ~ '\\n\\n' ~ part.text -%}
        {%- set turn.parts = turn.parts[:-1] + [{'type': 'text', 'text': text}] -%}
      {%- else -%}
        {%- set turn.parts = turn.parts + [part] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set turn.calls = turn.calls + (message.tool_calls or []) -%}
"""
_USER = """\
    {%- if role == 'user' and users.@place@ == loop.index0 and tools -%}
      {{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {%- if ends and role == 'user' -%}
      {%- set parts = turn.parts -%}
      {%- if parts | length == 2 and parts[0].type == 'text' -%}
        {%- set parts = [parts[1], parts[0]] -%}
      {%- endif -%}
      {{- '[INST]' -}}
      {%- for part in parts -%}
        {{- part.text if part.type == 'text' else '[IMG]' -}}
      {%- endfor -%}
      {{- '[/INST]' -}}
    {%- elif ends -%}
      {{- turn.thoughts ~ texts(turn.parts) -}}
"""
_END = """\
      {{- eos_token -}}
    {%- endif -%}
  {%- elif role == 'tool' -%}
    {{- '[TOOL_RESULTS]' ~ @result@ ~ '[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- raise_exception("the roles are system, user, assistant and tool, not '" ~ role ~ "'") -}}
  {%- endif -%}
{%- endfor -%}
"""
_THOUGHTS = """\
    {%- set thought = message.reasoning_content -%}
    {%- if role == 'assistant' and thought -%}
      {%- set turn.thoughts = turn.thoughts ~ '[THINK]' ~ thought ~ '[/THINK]' -%}
    {%- endif -%}
"""
#: Calls are named by the last nine characters of their ids, which is all of an id that such a model makes.
_LISTED_CALLS = """\
      {%- if turn.calls -%}
        {{- '[TOOL_CALLS][' -}}
        {%- for call in turn.calls -%}
          {{- '{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
          {{- (call.function.arguments | tojson) ~ ', "id": "' ~ (call.id or '')[-9:] ~ '"}' -}}
          {{- ', ' if not loop.last else '' -}}
        {%- endfor -%}
        {{- ']' -}}
      {%- endif -%}
"""
_NAMED_CALLS = """\
      {%- for call in turn.calls -%}
        {{- '[TOOL_CALLS]' ~ call.function.name ~ @id@ ~ '[ARGS]' ~ (call.function.arguments | tojson) -}}
      {%- endfor -%}
"""
_NAMED_RESULT = "(message.tool_call_id or '')[-9:] ~ '[TOOL_CONTENT]' ~ texts(message.content)"
#: By version: the user's turn behind the tools, the thoughts, the calls and the result of a tool.
_VERSIONS = {
    "v7": ("last", "", _LISTED_CALLS, _NAMED_RESULT),
    "v11": ("last", "", _NAMED_CALLS.replace("@id@", "'[CALL_ID]' ~ (call.id or '')[-9:]"), _NAMED_RESULT),
    "v13": ("first", _THOUGHTS, _NAMED_CALLS.replace("~ @id@ ", ""), "texts(message.content)"),
}


def mistral_template(folder: Path) -> str | None:
    """Return the Jinja template for a folder's tekken.json; None if it has none, or of an unknown version.

    Raises:
        CheckpointError: tekken.json can't be read.
    """
    file = folder / tekken.FILE
    version = tekken.chat_version(file) if file.is_file() else None
    if version not in _VERSIONS:
        return None
    place, thoughts, calls, result = _VERSIONS[version]
    user = _USER.replace("@place@", place)
    return _START + _TURNS + thoughts + user + calls + _END.replace("@result@", result)
