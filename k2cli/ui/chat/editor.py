"""Editing of a message on the terminal: several lines, history, completion, pasted text.

A dumb terminal gets the line editing of the system instead, without escape sequences.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.files import disk_reason, read_regular, read_tail, write_atomically
from k2cli.ui.chat.stream import columns_of
from k2cli.ui.chat.width import cut
from k2cli.ui.output import note, print_prompt, stderr_console
from k2cli.units import MIB, clean_text, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from k2cli.chat.terminal import Complete

PROMPT = ">>> "
_CONTINUED = "... "
_QUOTES = '"""'
_MOST_HISTORY_BYTES = 2**20
_MOST_ENTRY_CHARACTERS = 2**16
"""Characters of a message that is kept in the history; a larger one is no line to come back to."""
_MENU_LINES = 6
_MOST_MESSAGE_BYTES = 16 * MIB
"""Largest message that an editor may leave; a request has at most 32 MiB."""


def is_open(text: str) -> bool:
    """True if a message began with three quotes and has not ended with them."""
    text = text.strip()
    if not text.startswith(_QUOTES):
        return False
    return not (len(text) >= 2 * len(_QUOTES) and text.endswith(_QUOTES))


def unquoted(text: str) -> str:
    """Take the three quotes off a message."""
    stripped = text.strip()
    if not stripped.startswith(_QUOTES) or is_open(stripped):
        return text
    return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def make_editor(history_file: Path | None) -> LineEditor | PlainEditor:
    """Return the editor for this terminal; without a file, what is entered is not kept."""
    if stderr_console().is_dumb_terminal:
        return PlainEditor()
    return LineEditor(history_file)


class PlainEditor:
    """Reader of lines with nothing but what the system offers."""

    typed_before = ""

    def take_typed(self) -> str:
        """Return nothing: the system keeps what was typed."""
        return ""

    def read_answer(self, prompt: str) -> str:
        """Read the answer to a question.

        Raises:
            EOFError: at the end of the input.
        """
        return self._line(prompt)

    def read(self, status: str, complete: Complete) -> str:
        """Read a message.

        Raises:
            EOFError: at the end of the input.
        """
        text = self._line(PROMPT)
        while is_open(text):
            text += "\n" + self._line(_CONTINUED)
        return unquoted(text)

    @staticmethod
    def _line(prompt: str) -> str:
        print_prompt(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class LineEditor:
    """Editor with keys, history and completion."""

    def __init__(self, history_file: Path | None) -> None:
        self._history_file = history_file
        self._session: PromptSession[str] | None = None
        self._complete: Complete = lambda text: ()
        self._status = ""
        self._answers: PromptSession[str] | None = None
        self.typed_before = ""
        """Text that the next message begins with."""

    def take_typed(self) -> str:
        """Take what was typed behind the last message, which the editor has read already."""
        from prompt_toolkit.input.typeahead import get_typeahead

        keys = [] if self._session is None else get_typeahead(self._session.input)
        return "".join(key.data for key in keys)

    def read_answer(self, prompt: str) -> str:
        """Read the answer to a question; it is not kept in the history.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D on an empty line.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        if self._answers is None:
            self._answers = PromptSession(output=create_output(always_prefer_tty=True))
        return self._answers.prompt(prompt)

    def read(self, status: str, complete: Complete) -> str:
        """Read a message of one or several lines.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            EOFError: for Ctrl-D on an empty line.
        """
        self._complete, self._status = complete, status
        if self._session is None:
            self._session = self._open()
        begun, self.typed_before = self.typed_before, ""
        return unquoted(self._session.prompt(PROMPT, default=begun))

    def _open(self) -> PromptSession[str]:
        # Importing prompt_toolkit takes 0.2 s, and one-shot chats do not need it.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.output import create_output
        from prompt_toolkit.styles import Style

        @Condition
        def completing() -> bool:
            before = get_app().current_buffer.document.text_before_cursor
            words = before.split()
            mention = bool(words) and words[-1].startswith("@") and not before[-1:].isspace()
            return mention or (before.startswith("/") and "\n" not in before)

        return PromptSession(
            history=_open_history(self._history_file),
            output=create_output(always_prefer_tty=True),
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation=_CONTINUED,
            completer=self._completer(),
            complete_while_typing=completing,
            reserve_space_for_menu=_MENU_LINES,
            bottom_toolbar=self._toolbar,
            style=Style.from_dict({"bottom-toolbar": "noreverse", "bottom-toolbar.text": "dim"}),
            tempfile_suffix=".md",
            enable_open_in_editor=True,
        )

    def _toolbar(self) -> str:
        return cut(one_line(self._status), columns_of(sys.stderr) - 1)

    def _completer(self) -> Any:
        from prompt_toolkit.completion import Completer, Completion

        editor = self

        class ChatCompleter(Completer):
            def get_completions(
                self, document: Document, complete_event: CompleteEvent
            ) -> Iterable[Completion]:
                for each in editor._complete(document.text_before_cursor):
                    yield Completion(
                        each.text,
                        start_position=-each.length,
                        display=one_line(each.shown),
                        display_meta=one_line(each.meaning),
                    )

        return ChatCompleter()


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _open_history(path: Path | None) -> History:
    """Open the file of entered messages; one that cannot be written does not end a chat."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class LossyHistory(FileHistory):
        def store_string(self, string: str) -> None:
            if len(string) <= _MOST_ENTRY_CHARACTERS:
                with contextlib.suppress(OSError):  # a full disk: this line is not kept
                    super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The history is private to the user.
        path.touch(mode=0o600, exist_ok=True)
        _shorten(path)
    except OSError as error:
        note(f"what you enter is not kept: '{path}' cannot be written: {disk_reason(error, path)}")
        return InMemoryHistory()
    return LossyHistory(str(path))


def _shorten(path: Path) -> None:
    """Drop the older half of a history that has become large, at the beginning of an entry."""
    if path.stat().st_size <= _MOST_HISTORY_BYTES:
        return
    data = read_tail(path, _MOST_HISTORY_BYTES // 2)
    write_atomically(path, data[max(0, data.find(b"\n# ")) :], mode=0o600)


def edit_in_program(text: str) -> str:
    """Let the user edit a text in the editor that the environment names.

    Raises:
        K2Error: if there is none, or it fails.
    """
    import shlex
    import subprocess
    import tempfile

    from k2cli.errors import K2Error

    program = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="k2-chat-") as folder:  # mode 0700
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run([*shlex.split(program), str(path)], check=False)
        except (OSError, ValueError) as error:
            message = f"the editor '{program}' cannot be started: {error}"
            raise K2Error(message, "export EDITOR=nano") from error
        if done.returncode:
            raise K2Error(f"the editor '{program}' ended with status {done.returncode}")
        try:
            data = read_regular(path, _MOST_MESSAGE_BYTES)
        except OSError as error:
            raise K2Error(f"the editor left no message: {error}") from error
        return clean_text(data.decode(errors="replace"))
