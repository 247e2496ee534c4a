"""Interface of the terminal of a chat, which ``ui.chat.terminal`` implements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from k2cli.errors import K2Error


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion of the input: what replaces its last ``length`` characters."""

    text: str
    length: int
    shown: str
    meaning: str = ""


Complete = Callable[[str], Iterable[Completion]]
"""Returns the completions of the text before the cursor."""


class AnswerScreen(Protocol):
    """View of one answer."""

    def reasoning_text(self, text: str) -> None: ...
    def answer_text(self, text: str) -> None: ...
    def end(self) -> None: ...


class Terminal(Protocol):
    """Methods of a terminal that a chat calls."""

    def read_message(self, status: str, complete: Complete) -> str:
        """Read a message of one or several lines.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D on an empty line.
        """
        ...

    def answer_screen(
        self, status: Callable[[], str], thought: Callable[[], str], *, show_reasoning: bool
    ) -> AnswerScreen:
        """Return a view for the next answer, which shows the status until it begins."""
        ...

    def edit(self, text: str) -> str:
        """Let the user edit a text in an editor of the environment.

        Raises:
            K2Error: if there is no editor, or it fails.
        """
        ...

    def copy(self, text: str) -> str:
        """Copy a text to the clipboard; return how.

        Raises:
            K2Error: if the text is too long for it, or there is no way.
        """
        ...

    def choose(self, question: str, answers: dict[str, str]) -> str:
        """Ask a question until it is answered; return the key of the answer.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D.
        """
        ...

    def working(self, status: Callable[[], str]) -> AbstractContextManager[None]:
        """Show what is being done, and keep what is typed for the next message."""
        ...

    def call(self, text: str) -> None: ...
    def result(self, text: str, *, failed: bool) -> None: ...
    def show_result(self, text: str) -> None: ...
    def show_answer(self, text: str) -> None: ...
    def show_question(self, text: str) -> None: ...
    def show_reasoning(self, text: str) -> None: ...
    def figures(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, rows: list[tuple[str, str]]) -> None: ...
    def warn(self, text: str) -> None: ...
    def error(self, error: K2Error) -> None: ...
