"""Conversations of Anthropic's Messages API in the form of ``server.client_request``.

A message of the user may hold results of tools, which become turns of their own before its text. An
assistant's blocks become one turn with its reasoning, text and calls. Blocks that the model cannot
read, such as images, are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from k2cli.server.client_request import Conversation
from k2cli.server.dialects.anthropic_ids import model_id
from k2cli.server.dialects.anthropic_schemas import AnthropicMessage, Content, MessagesBody
from k2cli.server.dialects.shared_fields import log_left_out
from k2cli.server.errors import invalid

# Claude Code puts it first into the system prompt. Its value differs in every request, so that no
# prompt would begin like an earlier one, and the model needs none of it.
BILLING_HEADER = "x-anthropic-billing-header:"
_ROLES = {
    "thinking": "a message of the assistant",
    "redacted_thinking": "a message of the assistant",
    "tool_use": "a message of the assistant",
    "tool_result": "a message of the user",
}

Turn = dict[str, Any]
Block = dict[str, Any]


def anthropic_conversation(body: MessagesBody, normalizes_prompts: bool) -> Conversation:
    """Translate a request's system prompt, messages and tools.

    Args:
        normalizes_prompts: drop what clients put into prompts for others than the model.

    Raises:
        ApiError: 400 with the name of what the model cannot read.
    """
    turns: list[Turn] = []
    if body.system is not None:
        texts = _texts(body.system, "system")
        if normalizes_prompts:
            texts = [text for text in map(_without_billing_header, texts) if text]
        if any(texts):
            turns.append({"role": "system", "content": "\n\n".join(texts)})
    messages = _Messages()
    by_user = [index for index, message in enumerate(body.messages) if message.role == "user"]
    last_of_user = max(by_user, default=-1)
    for index, message in enumerate(body.messages):
        if not (message.clear_at == "next_user_message" and index < last_of_user):
            messages.add(message, f"messages[{index}]")
    turns += messages.finished()
    if all(turn["role"] == "system" for turn in turns):
        raise invalid("messages: there is no text of the user", "messages")
    tools: list[dict[str, Any]] = []
    places: list[str] = []
    if not (body.tool_choice and body.tool_choice.type == "none"):
        tools, places = _function_tools(body.tools or [])
    return Conversation(turns, tools or None, body.template_arguments, tool_places=places)


def _without_billing_header(text: str) -> str:
    """Remove the billing header's line from the beginning of a system prompt."""
    if not text.startswith(BILLING_HEADER):
        return text
    return text.partition("\n")[2].lstrip("\n")


class _Messages:
    """Translator of messages. Consecutive ones of one role are one turn, as in Anthropic's API."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._names: dict[str, str] = {}
        self._role = ""
        self._blocks: list[tuple[Block, str]] = []

    def add(self, message: AnthropicMessage, place: str) -> None:
        if message.role != self._role:
            self._end_turn()
        self._role = message.role
        blocks = message.content
        if isinstance(blocks, str):
            blocks = [{"type": "text", "text": blocks}]
        self._blocks += [(block, f"{place}.content[{index}]") for index, block in enumerate(blocks)]

    def finished(self) -> list[Turn]:
        self._end_turn()
        return self._turns

    def _end_turn(self) -> None:
        blocks, self._blocks = self._blocks, []
        match self._role:
            case "user":
                self._turns += self._user_turns(blocks)
            case "assistant":
                self._turns += self._assistant_turn(blocks)
            case "system":
                texts = [text for block, place in blocks if (text := _text(block, place))]
                self._turns += [{"role": "system", "content": "\n\n".join(texts)}] if texts else []

    def _user_turns(self, blocks: Sequence[tuple[Block, str]]) -> list[Turn]:
        results, texts = [], []
        for block, place in blocks:
            if block.get("type") == "tool_result":
                results.append(self._result(block, place))
            elif text := _text(block, place):
                texts.append(text)
        asked = [{"role": "user", "content": "\n\n".join(texts)}] if texts else []
        return results + asked

    def _result(self, block: Block, place: str) -> Turn:
        known = model_id(_string(block, "tool_use_id", place))
        content = block.get("content")
        text = "\n\n".join(_texts("" if content is None else _blocks(content, place), place))
        if block.get("is_error") is True and not _names_an_error(text):
            text = f"Error: {text}"
        turn = {"role": "tool", "content": text, "tool_call_id": known}
        if known in self._names:
            turn["name"] = self._names[known]
        return turn

    def _assistant_turn(self, blocks: Sequence[tuple[Block, str]]) -> list[Turn]:
        texts, thoughts, calls = [], [], []
        for block, place in blocks:
            match block.get("type"):
                case "thinking":
                    thoughts.append(_string(block, "thinking", place))
                case "redacted_thinking" | "fallback":
                    pass  # what another server encrypted cannot be read, and a mark has no text
                case "tool_use":
                    calls.append(self._call(block, place))
                case _:
                    texts.append(_text(block, place))
        if not any(texts) and not calls and not any(thoughts):
            return []
        turn: Turn = {"role": "assistant", "content": "".join(texts)}
        if any(thoughts):
            turn["reasoning_content"] = "\n".join(thoughts)
        if calls:
            turn["tool_calls"] = calls
        return [turn]

    def _call(self, block: Block, place: str) -> dict[str, Any]:
        known, name = model_id(_string(block, "id", place)), _name(block, place)
        given = block.get("input", {})
        if not isinstance(given, dict):
            raise invalid(f"{place}.input: must be an object", f"{place}.input")
        self._names[known] = name
        arguments = json.dumps(given, ensure_ascii=False)
        return {"id": known, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- blocks ---------------------------------------------------------------------------------------


def _blocks(content: Any, place: str) -> Content:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        message = f"{place}.content: must be a string or a list of content blocks"
        raise invalid(message, f"{place}.content")
    return content


def _texts(content: Content, place: str) -> list[str]:
    """Return the texts of content that may have texts only."""
    if isinstance(content, str):
        return [content]
    texts = [_text(block, f"{place}[{index}]") for index, block in enumerate(content)]
    return [text for text in texts if text]


def _text(block: Block, place: str) -> str:
    """Return the text of a block.

    Raises:
        ApiError: 400 for a block that the model cannot read.
    """
    kind = block.get("type")
    if kind == "text":
        return _string(block, "text", place)
    if kind == "tool_reference":
        return f"The tool {_string(block, 'tool_name', place)} can be called."
    if isinstance(kind, str) and kind in _ROLES:
        raise invalid(f"{place}: a block of type '{kind}' belongs into {_ROLES[kind]}", place)
    what = f"a block of type {kind!r}" if isinstance(kind, str) else "a block without a type"
    raise invalid(f"{place}: {what} cannot be read; only text can", place)


def _string(block: Block, member: str, place: str) -> str:
    value = block.get(member)
    if not isinstance(value, str):
        raise invalid(f"{place}.{member}: must be a string", f"{place}.{member}")
    return value


def _name(block: Block, place: str) -> str:
    name = _string(block, "name", place)
    if not name:
        raise invalid(f"{place}.name: must not be empty", f"{place}.name")
    return name


def _names_an_error(text: str) -> bool:
    return text.lstrip("< ")[:20].lower().startswith(("error", "tool_use_error"))


# --- tools ----------------------------------------------------------------------------------------


def _function_tools(tools: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the tools in OpenAI's form, and the places of their schemas.

    Tools that Anthropic's servers or models have are left out.
    """
    functions, places, left_out = [], [], []
    for index, tool in enumerate(tools):
        kind = tool.get("type")
        if kind not in (None, "custom") and "input_schema" not in tool:
            left_out.append(str(kind)[:100])
        else:
            functions.append(_function_tool(tool, f"tools[{index}]"))
            places.append(f"tools[{index}].input_schema")
    if left_out:
        log_left_out(tuple(sorted(set(left_out))))
    return functions, places


def _function_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise invalid(f"{place}.input_schema: must be an object", f"{place}.input_schema")
    function: dict[str, Any] = {"name": _name(tool, place)}
    if tool.get("description") is not None:
        function["description"] = _string(tool, "description", place)
    examples = tool.get("input_examples")
    function["parameters"] = {**schema, "examples": examples} if examples else schema
    if not isinstance(strict := tool.get("strict"), bool | None):
        raise invalid(f"{place}.strict: must be true or false", f"{place}.strict")
    if strict:
        function["strict"] = True
    return {"type": "function", "function": function}
