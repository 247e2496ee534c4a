"""The calls of one answer: shown, allowed by the user or not, made, and their results kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from k2cli.chat.calls import ToolCall, close_calls, result_turn
from k2cli.chat.interrupts import noted_interrupts
from k2cli.chat.tools import MOST_ROUNDS, ToolBox, ToolResult
from k2cli.errors import K2Error
from k2cli.units import escape_json, format_bytes, one_line

if TYPE_CHECKING:
    from k2cli.chat.session import ChatSession
    from k2cli.client.answers import StreamEvent

_SHOWN_CHARACTERS = 1000
"""Characters of a call's arguments that are shown before the question."""

_SHOWN_LINES = 3
_STOPPED = "The user stopped this call."
_DENIED = "The user did not allow this call."
_TOO_MANY = f"The call was not made: {MOST_ROUNDS} answers with calls have followed one message."


class CallScreen(Protocol):
    """Methods of a terminal, or of stderr, with which calls are shown."""

    def call(self, text: str) -> None: ...
    def result(self, text: str, *, failed: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def working(self, status: Callable[[], str]) -> AbstractContextManager[None]: ...


Decide = Callable[[ToolCall], bool]
"""Returns True if a call may be made; raises KeyboardInterrupt if the user stops everything."""


def answer_calls(
    session: ChatSession, tools: ToolBox, screen: CallScreen, decide: Decide, *, command: str = ""
) -> bool:
    """Make the open calls of a conversation, and put their results into it.

    Args:
        command: shows a whole result, if there is such a command.

    Returns:
        False if the user stopped it; then the remaining calls are not made.
    """
    try:
        for call in session.open_calls:
            result = _answer(call, tools, screen, decide, command)
            session.turns.append(result_turn(call, result.text))
    except KeyboardInterrupt:
        close_calls(session.turns, _STOPPED)
        return False
    finally:
        close_calls(session.turns)
    return True


def _answer(
    call: ToolCall, tools: ToolBox, screen: CallScreen, decide: Decide, command: str
) -> ToolResult:
    screen.call(described_call(call))
    if refusal := tools.refusal(call):
        screen.result(refusal, failed=True)
        return ToolResult(refusal, failed=True)
    if not tools.is_allowed(call.name) and not decide(call):
        return ToolResult(_DENIED, failed=True)
    began = time.monotonic()

    def status() -> str:
        return f"{call.name} runs · {int(time.monotonic() - began)} s · Ctrl-C stops it"

    with noted_interrupts() as interrupts, screen.working(status):
        result = tools.run(call, lambda: interrupts.came)
    screen.result(folded(result, command), failed=result.failed)
    return result


def rounds(
    session: ChatSession,
    events: Generator[StreamEvent],
    answer: Callable[[], bool],
    note: Callable[[str], None],
) -> Iterator[Generator[StreamEvent]]:
    """Yield the streams of all answers to one message: after each one with calls, the next.

    Args:
        events: the stream of the first answer.
        answer: makes the open calls; returns False to stop.
        note: tells the user about the end of too many rounds.
    """
    yield events
    for _ in range(MOST_ROUNDS):
        if not session.open_calls or not answer():
            return
        yield session.proceed()
    if session.open_calls:
        close_calls(session.turns, _TOO_MANY)
        note(f"stopped after {MOST_ROUNDS} answers with calls; write a message to go on")


def described_call(call: ToolCall, *, whole: bool = False) -> str:
    """Describe a call: its name and its arguments as one line of JSON, made safe for a terminal."""
    arguments = call.parsed()
    text = call.arguments if arguments is None else json.dumps(arguments, ensure_ascii=False)
    shown = one_line(escape_json(text))
    if len(shown) > _SHOWN_CHARACTERS and not whole:
        rest = len(shown) - _SHOWN_CHARACTERS
        shown = f"{shown[:_SHOWN_CHARACTERS]}... ({rest:,} more characters)"
    return f"{one_line(call.name)} {shown}"


def is_cut(call: ToolCall) -> bool:
    """True if ``described_call`` leaves a part of the arguments out."""
    return described_call(call) != described_call(call, whole=True)


def folded(result: ToolResult, command: str = "") -> str:
    """Return the first lines of a result; if there are more, its size and what shows it whole."""
    lines = result.text.splitlines()
    shown = [line if len(line) <= 200 else f"{line[:200]}..." for line in lines[:_SHOWN_LINES]]
    text = "\n".join(shown)
    if len(lines) > _SHOWN_LINES or any(len(line) > 200 for line in lines[:_SHOWN_LINES]):
        size = format_bytes(max(result.whole_bytes, len(result.text.encode())))
        hint = f"; {command} shows it" if command else ""
        text += f"\n({len(lines)} lines, {size}{hint})"
    return text or "(empty)"


class RefuseOthers:
    """Decision of a chat that can ask nobody: only what the command line allows is called."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def __call__(self, call: ToolCall) -> bool:
        name = one_line(call.name)
        self._note(f"not allowed: {name}; to allow it: --allow-tool {name}")
        return False


def result_number(session: ChatSession, argument: str) -> str:
    """Return the text of a result: of the last one, or of a number from the end.

    Raises:
        K2Error: if there is none.
    """
    results = [turn for turn in session.turns if turn["role"] == "tool"]
    try:
        number = int(argument or "1")
    except ValueError:
        raise K2Error(f"'{argument}' is no number", "/result 2 shows the last but one") from None
    if not 1 <= number <= len(results):
        if not results:
            raise K2Error("no tool was called in this conversation", "/tools lists them")
        raise K2Error(
            f"there is no result {number}: this conversation has {len(results)}",
            f"/result {len(results)} shows the first",
        )
    return str(results[-number]["content"])
