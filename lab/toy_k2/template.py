"""A chat template for the toy with the same output as that of Kimi K2.

Every turn is ``<|im_CLASS|>NAME<|im_middle|>BODY<|im_end|>``; tools are declared in a turn of
their own before all others, calls stand in the assistant's turn, results come back as
``## Return of ID``. The wording of the template is k2's own.
"""

from __future__ import annotations

CHAT_TEMPLATE = """\
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part is mapping and part.get('type') == 'text' -%}
        {{- part['text'] -}}
      {%- else -%}
        {{- raise_exception('only text parts are supported') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
  <|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role == 'user' -%}
    <|im_user|>
  {%- elif role == 'assistant' -%}
    <|im_assistant|>
  {%- elif role in ('system', 'tool') -%}
    <|im_system|>
  {%- else -%}
    {{- raise_exception('unknown role: ' ~ role) -}}
  {%- endif -%}
  {{- message.get('name') or role }}<|im_middle|>
  {%- if role == 'tool' -%}
    {{- '## Return of ' ~ message.get('tool_call_id', '') ~ '\\n' -}}
  {%- endif -%}
  {{- body(message.get('content')) -}}
  {%- if message.get('tool_calls') -%}
    <|tool_calls_section_begin|>
    {%- for call in message['tool_calls'] -%}
      <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
      {%- set arguments = call['function']['arguments'] -%}
      {{- arguments if arguments is string else arguments | tojson -}}
      <|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}
"""
