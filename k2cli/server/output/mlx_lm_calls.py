"""Calls that mlx-lm's parsers read: whole ones, and single arguments of typed forms.

The parsers search by regular expressions, some of which take quadratic time or worse on texts that
were made for that. A model may repeat such a text, so the size is limited, and texts in which tags
do not match are not given to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.server.output.source import Reading
from k2cli.server.output.tool_format import CallContext, Tools

MAX_WHOLE_LETTERS = 2**18
_MAX_GEMMA_CALLS = 64
_GEMMA4_QUOTE = '<|"|>'
_MAX_GEMMA4_WORK = 2**27
"""Letters times quotation marks: the parser goes through the whole text for each string."""
_MAX_PYTHON_PARTS = 2**14
"""Parentheses and commas; Python's own parser makes objects of 100 times their size."""
_GEMMA4_PARTS = re.compile(r'<\|"\|>|[{}]')


def _is_balanced(text: str) -> bool:
    """Return True if the braces of Gemma 4's form, outside of its strings, are in pairs."""
    depth, quoted = 0, False
    for found in _GEMMA4_PARTS.finditer(text):
        if found[0] not in "{}":
            quoted = not quoted
        elif not quoted:
            depth += 1 if found[0] == "{" else -1
            if depth < 0:
                return False
    return depth == 0 and not quoted


def _is_safe(parser: str, text: str) -> bool:
    if len(text) > MAX_WHOLE_LETTERS:
        return False
    if parser == "gemma4":
        work = len(text) * text.count(_GEMMA4_QUOTE)
        return work <= _MAX_GEMMA4_WORK and _is_balanced(text)
    if parser == "pythonic":
        return text.count("(") + text.count(",") <= _MAX_PYTHON_PARTS
    return parser != "function_gemma" or text.count("call:") <= _MAX_GEMMA_CALLS


def parse_whole(parser: str, text: str, tools: Tools) -> list[dict[str, Any]]:
    """Parse the text between the markers of calls; no calls if it has none.

    The result's members are ``name``, ``arguments`` and maybe ``id``.
    """
    if not _is_safe(parser, text):
        return []
    try:
        found = mlx_lm_module(f"tool_parsers.{parser}").parse_tool_call(text, tools)
    except Exception:  # a parser may raise anything on unexpected text
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return calls


def arguments_text(arguments: Any) -> str:
    """Return arguments as JSON text; text that is no JSON is left as it is."""
    if isinstance(arguments, str):
        return arguments
    return json_text({} if arguments is None else arguments)


def json_text(value: Any) -> str:
    """Return a value as JSON text; the text of the value if it cannot be JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # a lone surrogate is written as an escape
    except UnicodeEncodeError:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(str(value))
    return text


def whole_calls(parser: str, close: str) -> Callable[[CallContext, str], Reading]:
    """Make a reader that collects the text between the markers, and parses it then."""

    def read(context: CallContext, marker: str) -> Reading:
        parts: list[str] = []
        ends = context.markers(close) if close else ()
        found = yield from context.source.until(ends, parts.append)
        emit_whole(context, parser, "".join(parts), context.shown(marker), context.shown(found))

    return read


def emit_whole(context: CallContext, parser: str, body: str, before: str, after: str) -> None:
    """Emit the calls in a text; the text itself with its markers if there are none."""
    calls = parse_whole(parser, body, context.tools)
    emitter = context.emitter
    for call in calls:
        call_id = call.get("id")
        if not emitter.begin(call["name"], call_id if isinstance(call_id, str) else None):
            calls = []
            break
        emitter.arguments(arguments_text(call.get("arguments")))
        emitter.end()
    if not calls:
        context.text(before + body + after)
