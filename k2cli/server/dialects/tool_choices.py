"""The choice of tools, in the words of OpenAI's Chat and Responses and of Anthropic's Messages."""

from __future__ import annotations

from typing import Any

from k2cli.server.client_request import ToolChoice
from k2cli.server.errors import ApiError, invalid, type_named

MAX_ALLOWED = 1024
_FIELD = "tool_choice"
_WORDS = "'auto', 'none', 'required', a 'function' and 'allowed_tools' are supported"


def openai_tool_choice(value: Any) -> ToolChoice:
    """Read ``tool_choice`` of Chat or Responses; each is also read in the other's form.

    ``none`` means the same as no tools, and is treated where the tools are shown.

    Raises:
        ApiError: 400 for a choice that is not understood.
    """
    if value is None or value in ("auto", "none"):
        return ToolChoice()
    if value == "required":
        return ToolChoice(required=True)
    if isinstance(value, str):
        raise invalid(f"{_FIELD}: {value[:100]!r} is not supported; {_WORDS}", _FIELD)
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "function":
            return ToolChoice(required=True, names=(_name(value, _FIELD),))
        case "allowed_tools":
            members = value.get("allowed_tools", value)
            if not isinstance(members, dict):
                raise invalid(f"{_FIELD}.allowed_tools must be an object", _FIELD)
            return _allowed(members)
        case str():
            raise invalid(f"{_FIELD}: {kind[:100]!r} is not supported; {_WORDS}", _FIELD)
        case _:
            raise invalid(f"{_FIELD}: must be a text or an object with a 'type'", _FIELD)


def shows_tools(value: Any) -> bool:
    """Return True if the model is shown the tools with this choice."""
    if isinstance(value, dict) and value.get("type") == "none":
        return False
    return bool(value != "none")


def anthropic_tool_choice(kind: str | None, name: Any) -> ToolChoice:
    """Read ``tool_choice`` of Messages.

    Raises:
        ApiError: 400 for a choice that is not understood.
    """
    match kind:
        case None | "auto" | "none":
            return ToolChoice()
        case "any":
            return ToolChoice(required=True)
        case "tool":
            if not isinstance(name, str) or not name:
                raise invalid(f"{_FIELD}.name: must be the name of a tool", f"{_FIELD}.name")
            return ToolChoice(required=True, names=(name,))
        case _:
            message = f"{_FIELD} {type_named(kind)}; 'auto', 'any', 'tool' and 'none' are supported"
            raise invalid(message, f"{_FIELD}.type")


def _allowed(members: dict[str, Any]) -> ToolChoice:
    mode, tools = members.get("mode", "auto"), members.get("tools")
    if mode not in ("auto", "required"):
        raise invalid(f"{_FIELD}: its mode must be 'auto' or 'required'", _FIELD)
    if not isinstance(tools, list) or not 0 < len(tools) <= MAX_ALLOWED:
        raise invalid(f"{_FIELD}: must have 1 to {MAX_ALLOWED} tools", _FIELD)
    names = []
    for index, tool in enumerate(tools):
        place = f"{_FIELD}: tool {index}"
        if not isinstance(tool, dict):
            raise _no_function(place, None)
        if tool.get("type") != "function":
            raise _no_function(place, tool.get("type"))
        names.append(_name(tool, place))
    return ToolChoice(required=mode == "required", names=tuple(dict.fromkeys(names)))


def _name(choice: dict[str, Any], place: str) -> str:
    """Return a function's name, which Chat has in an object ``function``."""
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise invalid(f"{place}: needs the 'name' of a function", _FIELD)
    return name


def _no_function(place: str, kind: object) -> ApiError:
    return invalid(f"{place} {type_named(kind)}, but only 'function' is supported", _FIELD)
