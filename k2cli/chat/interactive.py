"""Interactive chat: reads lines, executes ``/commands``, streams answers.

Ctrl-C during an answer stops it, also on the server, and keeps the partial answer; at the prompt
it prints how to leave. A failure of the server ends the answer but not the chat.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Protocol

from k2cli.chat.figures import figures_line, progress_line
from k2cli.chat.session import ChatSession
from k2cli.client.answers import Delta, Progress, ReasoningDelta, StreamEvent
from k2cli.errors import K2Error

_QUOTES = '"""'
HELP = '''\
/help, /?        this list
/system TEXT     set the system prompt; without TEXT, show it
/regen           answer the last question again
/clear           start a new conversation
/stats           turn statistics after each answer on or off
/exit, /bye      leave (Ctrl-D does too)

Begin with """ to write several lines, and end with """. Ctrl-C stops an answer.'''


class Terminal(Protocol):
    """Methods of ``ui.chat.terminal.ChatTerminal`` that the chat calls."""

    def read_line(self, *, continued: bool = False) -> str: ...
    def status(self, text: str) -> None: ...
    def reasoning_text(self, text: str) -> None: ...
    def answer_text(self, text: str) -> None: ...
    def answer_end(self) -> None: ...
    def figures(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def error(self, error: K2Error) -> None: ...


class Chat:
    """One interactive chat; ``run`` returns when the user leaves."""

    def __init__(self, session: ChatSession, terminal: Terminal) -> None:
        self._session = session
        self._terminal = terminal
        self._figures = True
        self._leaving = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/?": self._help,
            "/exit": self._leave,
            "/bye": self._leave,
            "/quit": self._leave,
            "/clear": self._clear,
            "/system": self._system,
            "/stats": self._stats,
            "/regen": self._regenerate,
        }

    def run(self) -> None:
        """Chat until the user leaves."""
        self._terminal.note(f"{self._session.model.name}: /help for commands, Ctrl-D to leave")
        while not self._leaving:
            try:
                text = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._terminal.note("Ctrl-D or /exit to leave")
                continue
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._show(self._session.ask(text))

    def _read(self) -> str:
        text = self._terminal.read_line().strip()
        if not text.startswith(_QUOTES):
            return text
        lines = text.removeprefix(_QUOTES)
        while not lines.rstrip().endswith(_QUOTES):
            lines += "\n" + self._terminal.read_line(continued=True)
        return lines.rstrip().removesuffix(_QUOTES).strip("\n")

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if (command := self._commands.get(name)) is None:
            self._terminal.note(f"there is no command '{name}'; /help lists them")
        else:
            command(argument.strip())

    def _show(self, events: Generator[StreamEvent]) -> None:
        """Stream an answer to the terminal."""
        failure: K2Error | None = None
        stopped = False
        try:
            # Closing the generator tells the server to stop.
            with closing(events) as stream:
                for event in stream:
                    if isinstance(event, Delta):
                        self._terminal.answer_text(event.text)
                    elif isinstance(event, ReasoningDelta):
                        self._terminal.reasoning_text(event.text)
                    elif isinstance(event, Progress) and (line := progress_line(event)):
                        self._terminal.status(line)
        except KeyboardInterrupt:
            stopped = True
        except K2Error as error:
            failure = error
        self._terminal.answer_end()
        answer = self._session.answer
        if failure is not None:
            self._terminal.error(failure)
        elif stopped:
            self._terminal.note("stopped")
        elif self._figures and answer is not None:
            self._terminal.figures(figures_line(answer))

    def _help(self, argument: str) -> None:
        for line in HELP.splitlines():
            self._terminal.note(line)

    def _leave(self, argument: str) -> None:
        self._leaving = True

    def _clear(self, argument: str) -> None:
        self._session.clear()
        self._terminal.note("new conversation")

    def _system(self, argument: str) -> None:
        if argument:
            self._session.system = argument
        self._terminal.note(f"system prompt: {self._session.system or 'none'}")

    def _stats(self, argument: str) -> None:
        self._figures = not self._figures
        self._terminal.note(f"statistics after each answer: {'on' if self._figures else 'off'}")

    def _regenerate(self, argument: str) -> None:
        try:
            events = self._session.regenerate()
        except K2Error as error:
            self._terminal.error(error)
        else:
            self._show(events)
