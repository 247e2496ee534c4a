"""Translation of the items and tools of OpenAI's Responses API to a conversation.

One turn of an assistant is several items there: reasoning, messages and calls. They are joined to
one turn, as the model wrote it, until a user, a tool or a system speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2cli.server.client_request import Conversation
from k2cli.server.dialects.responses_schemas import ResponsesBody
from k2cli.server.dialects.shared_fields import MAX_PARTS, MAX_TOOLS, log_left_out
from k2cli.server.dialects.tool_choices import shows_tools
from k2cli.server.errors import ApiError, invalid, type_named

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXTS = ("input_text", "output_text", "text")
Turn = dict[str, Any]


def responses_conversation(body: ResponsesBody) -> Conversation:
    """Return the conversation of a request.

    Raises:
        ApiError: 400 that names the item or tool which cannot be translated.
    """
    turns: list[Turn] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        turns.append({"role": "user", "content": body.input})
    else:
        turns += _turns(body.input)
    if not turns:
        raise invalid("input has nothing for the model", "input")
    tools, namespaces, places = _tools(body.tools or [])
    return Conversation(
        turns,
        tools if tools and shows_tools(body.tool_choice) else None,
        body.template_arguments,
        # This API has no way to continue an assistant's text.
        continue_last=False,
        field="input",
        namespaces=namespaces,
        tool_places=places,
    )


# --- items ----------------------------------------------------------------------------------------


def _turns(items: Sequence[dict[str, Any]]) -> list[Turn]:
    turns: list[Turn] = []

    def assistant() -> Turn:
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": ""})
        return turns[-1]

    for index, item in enumerate(items):
        place = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                role = _ROLES.get(_text_member(item, "role", place))
                if role is None:
                    raise invalid(f"{place}.role: {item['role']!r} is no role", f"{place}.role")
                text = _text_of(item.get("content"), f"{place}.content")
                if role == "assistant":
                    assistant()["content"] += text
                else:
                    turns.append({"role": role, "content": text})
            case "reasoning":
                thought = _reasoning_of(item, place)
                turn = assistant()
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
            case "function_call":
                assistant().setdefault("tool_calls", []).append(_call(item, place))
            case "function_call_output":
                turns.append(
                    {
                        "role": "tool",
                        "tool_call_id": _text_member(item, "call_id", place),
                        "content": _text_of(item.get("output"), f"{place}.output"),
                    }
                )
            case "item_reference":
                message = f"{place}: nothing is stored here: send the item itself"
                raise invalid(message, place, "unsupported_parameter")
            case kind:
                message = f"{place}: an item that {type_named(kind)} is not supported"
                raise invalid(message, f"{place}.type", "unsupported_parameter")
    return turns


def _text_member(item: dict[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{place}.{name} must be a text", f"{place}.{name}")
    return value


def _text_of(content: Any, place: str) -> str:
    """Join the parts of a content."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise invalid(f"{place} must be a text or a list of parts", place)
    if len(content) > MAX_PARTS:
        raise invalid(f"{place} has {len(content)} parts, and the most are {MAX_PARTS}", place)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            texts.append(_text_member(part, "refusal", f"{place}[{index}]"))
        elif kind in _TEXTS:
            texts.append(_text_member(part, "text", f"{place}[{index}]"))
        else:
            message = f"{place}[{index}] {type_named(kind)}, but this model reads only text"
            raise invalid(message, f"{place}[{index}]")
    return "".join(texts)


def _reasoning_of(item: dict[str, Any], place: str) -> str:
    """Return the text of reasoning, or of its summary if there is no more of it.

    Encrypted reasoning is of another server; nobody here can read it, and its text is used.
    """
    texts: list[str] = []
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise invalid(f"{place}.{name} must be a list of parts", f"{place}.{name}")
        if len(parts) > MAX_PARTS:
            message = f"{place}.{name} has {len(parts)} parts, and the most are {MAX_PARTS}"
            raise invalid(message, f"{place}.{name}")
        texts = [
            _text_member(part, "text", f"{place}.{name}[{index}]")
            for index, part in enumerate(parts)
        ]
        if texts:
            break
    return "\n".join(texts)


def _call(item: dict[str, Any], place: str) -> dict[str, Any]:
    arguments = item.get("arguments", "")
    if not isinstance(arguments, str):
        raise invalid(f"{place}.arguments must be JSON text", f"{place}.arguments")
    function = {"name": _text_member(item, "name", place), "arguments": arguments}
    return {"id": _text_member(item, "call_id", place), "type": "function", "function": function}


# --- tools ----------------------------------------------------------------------------------------


def _tools(
    tools: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Return functions in the form of chat completions, the namespaces of those in one, and places.

    Tools that OpenAI's servers run, and those whose calls are not JSON, are left out: the model is
    not shown what nobody here can carry out.
    """
    found: list[dict[str, Any]] = []
    namespaces: dict[str, str] = {}
    places: list[str] = []
    left_out = []
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        match tool.get("type"):
            case "function":
                found.append(_function(tool, place))
                places.append(f"{place}.parameters")
            case "namespace":
                inner = tool.get("tools")
                if not isinstance(inner, list) or not all(isinstance(one, dict) for one in inner):
                    raise invalid(f"{place}.tools must be a list of tools", f"{place}.tools")
                name = _text_member(tool, "name", place)
                for number, one in enumerate(inner):
                    if one.get("type") != "function":
                        left_out.append(str(one.get("type"))[:100])
                        continue
                    function = _function(one, f"{place}.tools[{number}]")
                    namespaces[function["function"]["name"]] = name
                    found.append(function)
                    places.append(f"{place}.tools[{number}].parameters")
            case str() as kind:
                left_out.append(kind[:100])
            case kind:
                raise invalid(f"{place} {type_named(kind)}", f"{place}.type")
    if len(found) > MAX_TOOLS:
        raise invalid(f"tools has {len(found)} functions; the most are {MAX_TOOLS}", "tools")
    _check_names(found)
    if left_out:
        log_left_out(tuple(sorted(set(left_out))))
    return found, namespaces, places


def _function(tool: dict[str, Any], place: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": _text_member(tool, "name", place)}
    if tool.get("description") is not None:
        function["description"] = _text_member(tool, "description", place)
    parameters = tool.get("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise invalid(f"{place}.parameters must be an object", f"{place}.parameters")
        function["parameters"] = parameters
    if not isinstance(strict := tool.get("strict"), bool | None):
        raise invalid(f"{place}.strict must be true or false", f"{place}.strict")
    if strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _check_names(functions: Sequence[dict[str, Any]]) -> None:
    """Refuse two functions of one name: a call would not say which of them is meant."""
    names: set[str] = set()
    for function in functions:
        name = function["function"]["name"]
        if name in names:
            raise ApiError(400, f"tools has two functions '{name}'", param="tools")
        names.add(name)
