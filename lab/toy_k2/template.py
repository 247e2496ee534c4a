"""Chat templates for the toy with the same output as those of Kimi K2, K2-Thinking and K2.5.

Every turn is ``<|im_CLASS|>NAME<|im_middle|>BODY<|im_end|>``; tools are declared in a turn of
their own before all others, calls stand in the assistant's turn, results come back as
``## Return of ID``. The models that think write their reasoning between tags at the beginning of an
assistant's turn; turns up to the last finished answer keep only the tags. The wording of the
templates is k2's own.
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

_ANSWER = "  {{- body(message.get('content')) -}}\n"
_LOOP = "{%- for message in messages -%}\n"
_ANSWERED = """\
{%- set answered = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' and not message.get('tool_calls') -%}
    {%- set answered.last = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
"""
_THOUGHT = """\
  {%- if role == 'assistant' -%}
    {%- set shown = loop.index0 > answered.last -%}
    <think>{{ message.get('reasoning_content', '') if shown }}</think>
  {%- endif -%}
"""
_JSON_TOOLS = "{{ tools | tojson(separators=(',', ':')) }}"
_DEFAULT_SYSTEM = CHAT_TEMPLATE[
    CHAT_TEMPLATE.index("{%- if not messages or") : CHAT_TEMPLATE.index(_LOOP)
]
_PROMPT = "  <|im_assistant|>assistant<|im_middle|>\n{%- endif -%}\n"

THINKING_TEMPLATE = (
    CHAT_TEMPLATE.replace(_LOOP, _ANSWERED + _LOOP)
    .replace(_ANSWER, _THOUGHT + _ANSWER)
    .replace(_JSON_TOOLS, "{{ tools | tojson }}")
)
"""That of Kimi K2-Thinking."""

K25_TEMPLATE = (
    CHAT_TEMPLATE.replace(_DEFAULT_SYSTEM, "")
    .replace(_LOOP, _ANSWERED + _LOOP)
    .replace(
        _ANSWER,
        _THOUGHT.replace("answered.last", "answered.last and thinking is not false") + _ANSWER,
    )
    .replace(
        _JSON_TOOLS,
        "{%- if tools_ts_str -%}{{ tools_ts_str }}{%- else -%}" + _JSON_TOOLS + "{%- endif -%}",
    )
    .replace(
        _PROMPT,
        _PROMPT.replace(
            "\n{%- endif", "{{ '<think></think>' if thinking is false else '<think>' }}\n{%- endif"
        ),
    )
)
"""That of Kimi K2.5, which opens the reasoning itself and declares tools in TypeScript."""
