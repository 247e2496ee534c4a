"""Files that a message quotes: read with limits, and put into the message with name and size."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import K2Error, UsageError
from k2cli.files import read_regular
from k2cli.settings import expand_home
from k2cli.units import MIB, format_bytes

MOST_BYTES = 4 * MIB
"""Largest file that is quoted: a million tokens, more than any context."""

_MENTION = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|'([^'\n]+)'|(\S+))""")
_LIKE_A_PATH = re.compile(r"/|\.\w{1,8}$")
_TRAILING = ".,:;!?)"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file of text as it is quoted: its name as the user gave it, and its content."""

    name: str
    text: str

    @property
    def description(self) -> str:
        """Name, lines and size."""
        count = self.text.count("\n") + (not self.text.endswith("\n") and self.text != "")
        lines = f"{count} line" + ("" if count == 1 else "s")
        return f"{self.name} ({lines}, {format_bytes(len(self.text.encode()))})"


def read_attachment(name: str) -> Attachment:
    """Read a file of text.

    Raises:
        UsageError: if it cannot be read, is too large, or is no text.
    """
    try:
        data = read_regular(expand_home(name), MOST_BYTES, follow_links=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"'{name}' cannot be read: {reason}") from error
    if b"\0" in data:
        raise UsageError(f"'{name}' is no text: it has zero bytes")
    try:
        return Attachment(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"'{name}' is not UTF-8: byte {error.start} is no character") from error


def split_names(argument: str) -> list[str]:
    """Divide the argument of a command into names of files, with quotes as in a shell.

    Raises:
        K2Error: if a quote is not closed.
    """
    try:
        return shlex.split(argument)
    except ValueError:
        raise K2Error(f"a quote in '{argument}' is not closed") from None


def mentioned_files(message: str) -> list[str]:
    """Return the names after ``@`` that lead to a file; others, such as ``@ann``, are text."""
    names = []
    for match in _MENTION.finditer(message):
        quoted = match.group(1) or match.group(2)
        for name in (quoted,) if quoted else (match.group(3), match.group(3).rstrip(_TRAILING)):
            if name and _is_file(name):
                if name not in names:
                    names.append(name)
                break
    return names


def missing_files(message: str) -> list[str]:
    """Return the names after ``@`` that look like paths, by a slash or an ending, but are no files.

    A mistyped path is sent as text, and the model may answer as if it had read the file.
    """
    names = []
    for match in _MENTION.finditer(message):
        name = match.group(1) or match.group(2) or match.group(3).rstrip(_TRAILING)
        known = _is_file(name) or (match.group(3) and _is_file(match.group(3)))
        if _LIKE_A_PATH.search(name) and not known and name not in names:
            names.append(name)
    return names


def _is_file(name: str) -> bool:
    try:
        return expand_home(name).is_file()
    except (OSError, ValueError):
        return False


def with_attachments(message: str, attachments: list[Attachment]) -> str:
    """Put files before a message."""
    return "\n\n".join([*(_quoted(each) for each in attachments), *([message] if message else [])])


def _quoted(attachment: Attachment) -> str:
    """Quote a file as a block of code whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`{3,}", attachment.text)), default=2)
    fence = "`" * (longest + 1)
    language = Path(attachment.name).suffix.removeprefix(".")
    text = attachment.text if attachment.text.endswith("\n") else f"{attachment.text}\n"
    return f"File {attachment.description}:\n\n{fence}{language}\n{text}{fence}"
