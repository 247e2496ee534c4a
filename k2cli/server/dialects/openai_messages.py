"""Messages, tools and calls in the bodies of OpenAI's Chat Completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from k2cli.server.dialects.shared_fields import MAX_MESSAGES, MAX_PARTS, Objects
from k2cli.server.errors import type_named


def _joined_text(content: Any) -> Any:
    """Join content parts to one string; refuse parts that are not text."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise ValueError(f"has {len(content)} parts, and the most are {MAX_PARTS}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {index} {type_named(kind)}, but this model reads only text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} has no text")
        texts.append(part["text"])
    return "".join(texts)


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for index, tool in enumerate(tools):
        if (kind := tool.get("type")) != "function":
            message = f"tool {index} {type_named(kind)}, but only 'function' is supported"
            raise ValueError(message)
        function = _named_function(tool, f"tool {index}")
        if not isinstance(function.get("description"), str | None):
            raise ValueError(f"the 'description' of tool {index} must be a text")
        if not isinstance(function.get("parameters"), dict | None):
            raise ValueError(f"the 'parameters' of tool {index} must be an object")
        if not isinstance(function.get("strict"), bool | None):
            raise ValueError(f"'strict' of tool {index} must be true or false")
    return tools


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for index, call in enumerate(calls):
        kind = call.get("type")
        if kind not in (None, "function"):
            message = f"call {index} {type_named(kind)}, but only 'function' is supported"
            raise ValueError(message)
        function = _named_function(call, f"call {index}")
        # Clients of other servers send arguments as they are instead of their JSON text.
        if not isinstance(function.get("arguments"), str | dict | list | None):
            raise ValueError(f"the 'arguments' of call {index} must be JSON text or an object")
        if not isinstance(call.get("id"), str | None):
            raise ValueError(f"the 'id' of call {index} must be a text")
    return calls


def _named_function(owner: dict[str, Any], what: str) -> dict[str, Any]:
    function = owner.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ValueError(f"{what} needs an object 'function' with a 'name'")
    return function


_ContentInput = str | Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS)] | None
TextContent = Annotated[
    str | None, BeforeValidator(_joined_text, json_schema_input_type=_ContentInput)
]
Functions = Annotated[Objects, AfterValidator(_functions)]
Calls = Annotated[Objects, AfterValidator(_calls)]


class Message(BaseModel):
    """One turn of a conversation. Other members, which clients echo back, are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextContent = None
    name: str | None = None
    tool_calls: Calls | None = None
    tool_call_id: str | None = None
    # The model's reasoning, for templates that show it again after the result of a tool. Clients
    # send it back under the name under which they read it.
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        # The turn of an assistant may consist of tool calls only, and a tool may return nothing.
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError(f"a message of role '{self.role}' needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the dict for chat templates. ``developer`` is OpenAI's new word for system."""
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        for member in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, member)) is not None:
                turn[member] = value
        thoughts = self.reasoning if self.reasoning_content is None else self.reasoning_content
        if thoughts is not None and self.role == "assistant":
            turn["reasoning_content"] = thoughts
        return turn


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
