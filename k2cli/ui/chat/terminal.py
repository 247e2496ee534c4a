"""Terminal of an interactive chat: messages of the user, streamed answers, notes and figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.ui.chat.answer_view import AnswerView
from k2cli.ui.chat.clipboard import copy
from k2cli.ui.chat.editor import PROMPT, edit_in_program, make_editor
from k2cli.ui.chat.stream import (
    AnswerWriter,
    ReasoningWriter,
    StatusLine,
    dim_note,
    may_style,
    wrapped,
    write_sequence,
)
from k2cli.ui.chat.width import text_width
from k2cli.ui.output import note, print_error, stderr_console, warn
from k2cli.units import clean_text, one_line

if TYPE_CHECKING:
    from k2cli.chat.terminal import Complete

_MOST_TYPED_BYTES = 2**16
_MOST_LINES = 10
"""Lines of an earlier question that are shown again."""


class ChatTerminal:
    """Terminal of one chat.

    Args:
        history_file: where the lines that the user enters are kept; None to keep none.
        markdown: False to show answers as they are.
    """

    def __init__(self, history_file: Path | None, *, markdown: bool = True) -> None:
        self._editor = make_editor(history_file)
        self._markdown = markdown

    def read_message(self, status: str, complete: Complete) -> str:
        """Read a message of one or several lines.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D on an empty line.
        """
        return self._editor.read(status, complete)

    def answer_screen(
        self, status: Callable[[], str], thought: Callable[[], str], *, show_reasoning: bool
    ) -> QuietAnswerView:
        """Return a view for the next answer."""
        return QuietAnswerView(
            status, thought, show_reasoning=show_reasoning, markdown=self._markdown
        )

    def edit(self, text: str) -> str:
        """Let the user edit a text in an editor of the environment."""
        return edit_in_program(text)

    def copy(self, text: str) -> str:
        """Copy a text to the clipboard; return how."""
        return copy(text)

    def choose(self, question: str, answers: dict[str, str]) -> str:
        """Ask a question until it is answered; return the key of the answer.

        What was typed before the question cannot answer it.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D.
        """
        typed = (self._editor.take_typed() + _take_typed()).replace("\r", "\n")
        self._editor.typed_before += clean_text(typed)
        parts = (f"[{key}] {meaning}" for key, meaning in answers.items())
        note(wrapped(f"{one_line(question)} {', '.join(parts)}", 2))
        while (answer := self._editor.read_answer("? ").strip().lower()) not in answers:
            note(f"answer with {', '.join(answers)}")
        return answer

    @contextmanager
    def working(self, status: Callable[[], str]) -> Iterator[None]:
        """Show what is being done, and keep what is typed for the next message."""
        settings, line = _hide_keys(), StatusLine()
        line.show(status)
        try:
            yield
        finally:
            line.clear()
            _restore_keys(settings)

    def call(self, text: str) -> None:
        """Show a call of a tool."""
        note(wrapped(f"tool: {one_line(text)}", 2))

    def result(self, text: str, *, failed: bool) -> None:
        """Show the beginning of a tool's result."""
        lines = clean_text(text).split("\n")
        for number, line in enumerate(lines):
            dim_note(("! " if failed and number == 0 else "| ") + line)

    def show_result(self, text: str) -> None:
        """Show a tool's result whole."""
        writer = AnswerWriter(markdown=False)
        writer.write(text)
        writer.finish()

    def show_answer(self, text: str) -> None:
        """Show an answer that is there already."""
        writer = AnswerWriter(markdown=self._markdown)
        writer.write(text)
        writer.finish()

    def show_question(self, text: str) -> None:
        """Show a question that was asked before, as far as it is short."""
        lines = text.splitlines() or [""]
        for number, line in enumerate(lines[:_MOST_LINES]):
            dim_note((PROMPT if number == 0 else "... ") + line)
        if len(lines) > _MOST_LINES:
            dim_note(f"... ({len(lines) - _MOST_LINES} more lines)")

    def show_reasoning(self, text: str) -> None:
        """Show the reasoning of an earlier answer."""
        writer = ReasoningWriter()
        writer.write(text)
        writer.finish()

    def figures(self, text: str) -> None:
        """Show speed and token counts of the answer."""
        dim_note(text)

    def note(self, text: str) -> None:
        """Show a message."""
        note(wrapped(clean_text(text), 2))

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Show names with their meanings, in two columns."""
        width = max((text_width(one_line(name)) for name, _ in rows), default=0)
        for name, meaning in rows:
            name = one_line(name)
            space = " " * (width - text_width(name) + 2)
            note(wrapped(f"{name}{space}{one_line(meaning)}", width + 2))

    def warn(self, text: str) -> None:
        """Show a warning."""
        warn(_wrapped_behind("warning: ", text))

    def error(self, error: K2Error) -> None:
        """Show an error; the chat continues."""
        hint = _wrapped_behind("hint: ", error.hint) if error.hint else None
        print_error(K2Error(_wrapped_behind("error: ", error.message), hint))


def _wrapped_behind(label: str, text: str) -> str:
    """Wrap a text that is printed behind a label, which it leaves out."""
    return wrapped(label + clean_text(text), 2).removeprefix(label)


class QuietAnswerView(AnswerView):
    """View of an answer during which keys are not shown: they go to the next message."""

    def __init__(
        self,
        status: Callable[[], str],
        thought: Callable[[], str],
        *,
        show_reasoning: bool = False,
        markdown: bool = True,
    ) -> None:
        self._settings = _hide_keys()
        super().__init__(status, thought, show_reasoning=show_reasoning, markdown=markdown)

    def end(self) -> None:
        """End the answer, and show keys again."""
        try:
            super().end()
        finally:
            _restore_keys(self._settings)


def _hide_keys() -> list[Any] | None:
    """Turn off echo and line editing of the terminal; Ctrl-C stays a signal.

    Pasted text is marked as such by the terminal, so that the editor reads it as one message.
    """
    import termios

    if not sys.stdin.isatty() or stderr_console().is_dumb_terminal:
        return None
    try:
        before = termios.tcgetattr(sys.stdin)
        changed = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    except termios.error:
        return None
    _mark_pastes(on=True)
    return before


def _restore_keys(settings: list[Any] | None) -> None:
    import contextlib
    import termios

    if settings is not None:
        _mark_pastes(on=False)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)


def _take_typed() -> str:
    """Take what was typed during an answer, so that it does not answer a question.

    On a dumb terminal it is dropped: nothing can put it before the next message there.
    """
    import select
    import termios

    if not sys.stdin.isatty():
        return ""
    if stderr_console().is_dumb_terminal:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        return ""
    settings = _hide_keys()
    data = b""
    try:
        while len(data) < _MOST_TYPED_BYTES and select.select([sys.stdin], [], [], 0)[0]:
            if not (more := os.read(sys.stdin.fileno(), 4096)):
                break
            data += more
    except OSError:
        return ""
    finally:
        _restore_keys(settings)
    return data.decode(errors="ignore")


def _mark_pastes(*, on: bool) -> None:
    if may_style(sys.stderr):
        write_sequence("\x1b[?2004h" if on else "\x1b[?2004l")
