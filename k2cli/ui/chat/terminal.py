"""Terminal of an interactive chat: line editing, the streamed answer, notes and figures."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.errors import K2Error
from k2cli.files import disk_reason
from k2cli.ui.chat.stream import AnswerWriter, ReasoningWriter, StatusLine, dim_note
from k2cli.ui.output import note, print_error

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

PROMPT = ">>> "
_CONTINUED = "... "


def _open_history(path: Path) -> History:
    """Open the file of entered lines; one that cannot be written does not end a chat."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class LossyHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk: this line is not kept
                super().store_string(string)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The history is private to the user.
        path.touch(mode=0o600, exist_ok=True)
    except OSError as error:
        note(f"what you enter is not kept: '{path}' cannot be written: {disk_reason(error, path)}")
        return InMemoryHistory()
    return LossyHistory(str(path))


class ChatTerminal:
    """Terminal of one chat.

    Args:
        history_file: for the lines that the user enters.
        markdown: see ``AnswerWriter``.
    """

    def __init__(self, history_file: Path, *, markdown: bool = True) -> None:
        self._history_file = history_file
        self._markdown = markdown
        self._session: PromptSession[str] | None = None
        self._writer: AnswerWriter | None = None
        self._reasoning = ReasoningWriter()
        self._status = StatusLine()

    def read_line(self, *, continued: bool = False) -> str:
        """Read one line, or several if they were pasted together.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D on an empty line.
        """
        if self._session is None:
            self._session = self._open()
        return self._session.prompt(_CONTINUED if continued else PROMPT)

    def _open(self) -> PromptSession[str]:
        # Importing prompt_toolkit takes 0.2 s, and one-shot chats do not need it.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        return PromptSession(
            history=_open_history(self._history_file),
            output=create_output(always_prefer_tty=True),
        )

    def status(self, text: str) -> None:
        """Show the state of the server before the answer begins."""
        self._status.show(text)

    def reasoning_text(self, text: str) -> None:
        """Write more of the reasoning before the answer."""
        self._status.clear()
        self._reasoning.write(text)

    def answer_text(self, text: str) -> None:
        """Write more of the answer."""
        self._status.clear()
        self._reasoning.finish()
        if self._writer is None:
            self._writer = AnswerWriter(markdown=self._markdown)
        self._writer.write(text)

    def answer_end(self) -> None:
        """Finish an answer that is complete or was interrupted."""
        self._status.clear()
        self._reasoning.finish()
        if self._writer is not None:
            self._writer.finish()
            self._writer = None

    def figures(self, text: str) -> None:
        """Show speed and token counts of the answer."""
        dim_note(text)

    def note(self, text: str) -> None:
        """Show a message."""
        note(text)

    def error(self, error: K2Error) -> None:
        """Show an error; the chat continues."""
        print_error(error)
