"""Calls of tools in a conversation: as they arrive, as turns, and whole again after a break.

Every call has exactly one result after it, since servers refuse a conversation in which one is
missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from k2cli.client.answers import CallDelta
from k2cli.errors import K2Error
from k2cli.files import decode_json
from k2cli.units import MIB, format_bytes

MOST_CALLS = 32
"""Of one answer."""
_MOST_ARGUMENT_CHARACTERS = MIB
NO_RESULT = "There is no result: the call was not made, or was broken off."


@dataclass(slots=True)
class ToolCall:
    """One call as the model wrote it; ``arguments`` is JSON text, if the model kept to that."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""

    def parsed(self) -> dict[str, Any] | None:
        """Return the arguments; None if they are not a JSON object."""
        if not self.arguments.strip():
            return {}
        try:
            found = decode_json(self.arguments.encode(errors="replace"), type=dict[str, Any])
            json.dumps(found, allow_nan=False)  # a number of thousands of digits has no text
        except ValueError:  # msgspec's errors are of this kind
            return None
        return found

    def member(self) -> dict[str, Any]:
        """Return the call as a member of an assistant's turn.

        Servers may refuse arguments that are no JSON, then and in all later requests, so such a
        text is put into an object.
        """
        valid = self.parsed() is not None
        arguments = self.arguments if valid else json.dumps({"invalid": self.arguments})
        function = {"name": self.name, "arguments": arguments.strip() or "{}"}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class CallCollector:
    """The calls of one answer, put together from their pieces."""

    _calls: dict[int, ToolCall] = field(default_factory=dict)
    _characters: int = 0

    def add(self, delta: CallDelta) -> None:
        """Add a piece.

        Raises:
            K2Error: if there are too many calls, or their arguments are too long.
        """
        call = self._calls.setdefault(delta.index, ToolCall())
        call.call_id = call.call_id or delta.call_id
        call.name = call.name or delta.name
        call.arguments += delta.arguments
        self._characters += len(delta.arguments)
        if len(self._calls) > MOST_CALLS:
            raise K2Error(f"the model calls more than {MOST_CALLS} tools at once")
        if self._characters > _MOST_ARGUMENT_CHARACTERS:
            raise K2Error(
                "the arguments of the model's calls are longer than "
                f"{format_bytes(_MOST_ARGUMENT_CHARACTERS)}"
            )

    def whole(self) -> list[ToolCall]:
        """Return the calls in their order, each with an id of its own."""
        calls = [self._calls[index] for index in sorted(self._calls)]
        taken: set[str] = set()
        for number, call in enumerate(calls):
            if not call.call_id or call.call_id in taken:
                call.call_id = f"{call.name or 'call'}:{number}"
            taken.add(call.call_id)
        return calls


def result_turn(call: ToolCall, text: str) -> dict[str, Any]:
    """Return the turn with the result of a call."""
    return {"role": "tool", "tool_call_id": call.call_id, "content": text}


def open_calls(turns: list[dict[str, Any]]) -> list[ToolCall]:
    """Return the calls at the end of a conversation that have no result yet."""
    answered = set()
    for turn in reversed(turns):
        if turn["role"] == "tool":
            answered.add(turn.get("tool_call_id"))
            continue
        return [call for call in _calls_of(turn) if call.call_id not in answered]
    return []


def close_calls(turns: list[dict[str, Any]], text: str = NO_RESULT) -> None:
    """Give every call at the end of a conversation a result that it lacks."""
    turns += [result_turn(call, text) for call in open_calls(turns)]


def valid_turns(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which every call has a result, and every result has its call."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            if turn.get("tool_call_id") not in {call.call_id for call in open_calls(found)}:
                continue
        else:
            close_calls(found)
        found.append(turn)
    close_calls(found)
    return found


def _calls_of(turn: dict[str, Any]) -> list[ToolCall]:
    return [
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in turn.get("tool_calls", [])
    ]
