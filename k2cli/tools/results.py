"""Text of a tool's result, and checks of what servers say about their tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from k2cli.tools.messages import MOST_RESULT_BYTES, ToolInfo
from k2cli.units import KIB, format_bytes, one_line, replace_surrogates

MOST_TOOLS = 128
_MOST_NAME_LETTERS = 128
_MOST_DESCRIPTION_LETTERS = 4000
_MOST_SCHEMA_BYTES = 32 * KIB
_MOST_NESTING = 30


def result_text(content: Sequence[Any], structured: Any) -> str:
    """Return the text of the blocks of a result; what is no text is described.

    Args:
        content: blocks in MCP's form, as plain values.
        structured: the result as a JSON value, which is used if there is no block.
    """
    if not content and structured is not None:
        return replace_surrogates(json.dumps(structured, ensure_ascii=False))
    return replace_surrogates("\n".join(_block_text(block) for block in content))


def _block_text(block: Any) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "resource", "resource": {"text": str(text)}}:
            return text
        case {"type": "resource_link", "uri": uri}:
            return f"[link: {uri}]"
        case {"type": str(kind), "data": str(data)}:
            what = f"{kind} {block.get('mimeType', '')}".strip()
            return f"[{what}, {format_bytes(len(data) * 3 // 4)}, left out]"
        case {"type": str(kind)}:
            return f"[{kind}, left out]"
    return "[left out]"


def cut_result(text: str) -> tuple[str, int]:
    """Return the beginning of a result with a line about the rest, and the size of the whole."""
    data = text.encode()
    if len(data) <= MOST_RESULT_BYTES:
        return text, len(data)
    kept = data[:MOST_RESULT_BYTES].decode(errors="ignore")
    return f"{kept}\n[cut here: {len(kept.encode())} of {len(data)} bytes]", len(data)


def checked_tools(tools: Sequence[Any]) -> tuple[list[ToolInfo], list[str]]:
    """Return the tools that can be used, and why others are left out.

    Args:
        tools: tools in MCP's form, as plain values.
    """
    found: dict[str, ToolInfo] = {}
    left_out = []
    for tool in tools[:MOST_TOOLS]:
        name = str(tool.get("name", ""))
        schema = tool.get("inputSchema")
        if problem := _problem(name, schema, found):
            left_out.append(f"'{one_line(name)[:60]}': {problem}")
            continue
        description = replace_surrogates(str(tool.get("description") or tool.get("title") or ""))
        info = ToolInfo(name, description[:_MOST_DESCRIPTION_LETTERS], schema)
        try:
            msgspec.msgpack.encode(info)
        except (ValueError, OverflowError):
            left_out.append(
                f"'{one_line(name)[:60]}': its schema has values that JSON cannot carry"
            )
            continue
        found[name] = info
    if len(tools) > MOST_TOOLS:
        left_out.append(
            f"{len(tools) - MOST_TOOLS} more: at most {MOST_TOOLS} of a server are used"
        )
    return list(found.values()), left_out


def _problem(name: str, schema: Any, found: dict[str, ToolInfo]) -> str:
    if not name or len(name) > _MOST_NAME_LETTERS:
        return f"its name has {len(name)} characters"
    if name in found:
        return "its name occurs twice"
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return "its schema is not that of an object"
    if _depth(schema) > _MOST_NESTING:
        return f"its schema is nested more than {_MOST_NESTING} deep"
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        return "its schema has values that JSON cannot carry"
    if size > _MOST_SCHEMA_BYTES:
        return f"its schema has more than {format_bytes(_MOST_SCHEMA_BYTES)}"
    return ""


def _depth(value: Any) -> int:
    """Return how deeply a JSON value is nested, up to one more than is allowed."""
    deep, level = 0, [value]
    while level and deep <= _MOST_NESTING:
        deep += 1
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [
            item for each in inner for item in (each.values() if isinstance(each, dict) else each)
        ]
    return deep
