"""Conversations on disk: one JSON file each, which only the user can read.

A file that another chat changed in the meantime is not replaced: the conversation gets a new name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from k2cli.chat.calls import valid_turns
from k2cli.errors import K2Error
from k2cli.files import decode_json, encode_json, private_folder, read_regular, write_atomically
from k2cli.units import MIB

MOST_BYTES = 64 * MIB
MOST_LISTED = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MODE = 0o600
_Time = Annotated[float, msgspec.Meta(ge=0, le=2**37)]
"""Later times have no calendar date on some systems."""

_MOST_WORDS = 5


class CalledFunction(msgspec.Struct):
    """Name and arguments of a call."""

    name: str
    arguments: str


class SavedCall(msgspec.Struct):
    """One call of a tool, in the form of the API."""

    id: str
    function: CalledFunction
    type: str = "function"


class Turn(msgspec.Struct, omit_defaults=True):
    """One turn, in the form of the API."""

    role: str
    content: str
    reasoning_content: str = ""
    tool_calls: list[SavedCall] = []
    tool_call_id: str = ""


class Conversation(msgspec.Struct):
    """A saved conversation; times are seconds since the epoch.

    Attributes:
        title: the beginning of the first question.
        unsent: a question that got no answer.
        continues: the conversation whose summary this one began with.
    """

    name: str
    title: str
    model: str
    created: _Time
    updated: _Time
    turns: list[Turn]
    system: str | None = None
    unsent: str | None = None
    continues: str | None = None
    schema_version: int = 1


class ConversationStore:
    """The conversations of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, os.stat_result] = {}

    def save(self, conversation: Conversation) -> None:
        """Write a conversation; its name changes if the file is not the one that was read.

        Raises:
            K2Error: if it cannot be written.
        """
        try:
            private_folder(self._folder)
            path = self._path(conversation.name)
            if not self._is_known(conversation.name):
                conversation.name = self.free_name(conversation.name)
                path = self._path(conversation.name)
            write_atomically(path, encode_json(conversation), mode=_MODE)
            self._known[conversation.name] = path.stat()
        except OSError as error:
            raise K2Error(
                f"the conversation cannot be saved in '{self._folder}': {error.strerror or error}",
                "/save FILE writes it elsewhere",
            ) from error

    def load(self, name: str) -> Conversation:
        """Read a conversation by its name, or by the beginning of it if that is the only one.

        Raises:
            K2Error: if there is none, several, or its file cannot be read.
        """
        name = self._complete(name)
        conversation, self._known[name] = self._read(name)
        return conversation

    def _read(self, name: str) -> tuple[Conversation, os.stat_result]:
        path = self._path(name)
        try:
            found = path.stat()
            conversation = decode_json(read_regular(path, MOST_BYTES), type=Conversation)
        except (OSError, msgspec.MsgspecError) as error:
            raise K2Error(f"'{path}' cannot be read: {error}") from error
        conversation.name = name
        return conversation, found

    def newest(self) -> str:
        """Return the name of the conversation that was changed last.

        Raises:
            K2Error: if there is none.
        """
        names = self.names()
        if not names:
            raise K2Error("there is no saved conversation", "k2 chat")
        return names[0]

    def names(self) -> list[str]:
        """Return the names of all conversations, the one that was changed last first."""
        found = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    stem, ending = os.path.splitext(entry.name)
                    if ending == ".json" and _NAME.fullmatch(stem):
                        with suppress(FileNotFoundError):  # another chat has renamed it just now
                            found.append((entry.stat().st_mtime, stem))
        except OSError:
            return []
        return [name for _, name in sorted(found, reverse=True)]

    def search(self, text: str = "") -> Iterator[Conversation]:
        """Yield the newest conversations that contain a text, but no damaged files."""
        wanted, yielded = text.casefold(), 0
        for name in self.names():
            try:
                conversation, _ = self._read(name)
            except K2Error:
                continue
            if _contains(conversation, wanted):
                yield conversation
                yielded += 1
                if yielded == MOST_LISTED:
                    return

    def rename(self, conversation: Conversation, name: str) -> None:
        """Save a conversation under a name of the user's choice, and remove the old file.

        Raises:
            K2Error: if the name cannot be used, is taken, or the file cannot be written.
        """
        check_name(name)
        if self._path(name).exists():
            raise K2Error(f"there is a conversation '{name}' already", "/save another name")
        old, conversation.name = conversation.name, name
        self.save(conversation)
        if self._is_known(old):
            self._path(old).unlink(missing_ok=True)

    def free_name(self, wanted: str) -> str:
        """Return a name that no conversation has: the wanted one, or with a number."""
        number, name = 1, wanted
        while self._path(name).exists():
            number += 1
            name = f"{wanted[:90]}-{number}"
        return name

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _is_known(self, name: str) -> bool:
        """True if the file is the one that this chat read or wrote last, or there is none."""
        try:
            found = self._path(name).stat()
        except FileNotFoundError:
            return True
        known = self._known.get(name)
        return known is not None and (found.st_ino, found.st_mtime_ns) == (
            known.st_ino,
            known.st_mtime_ns,
        )

    def _complete(self, name: str) -> str:
        names = self.names()
        if name in names:
            return name
        found = [each for each in names if each.startswith(name)]
        if len(found) == 1:
            return found[0]
        what = f"{len(found)} conversations begin with '{name}'" if found else ""
        raise K2Error(
            what or f"there is no conversation '{name}'", "/sessions in k2 chat lists them"
        )


def turns_of(turns: list[dict[str, Any]]) -> list[Turn]:
    """Return the turns of the API in the form in which they are saved."""
    return msgspec.convert(turns, list[Turn])


def api_turns(turns: list[Turn]) -> list[dict[str, Any]]:
    """Return saved turns in the form of the API, with a result for each call."""
    return valid_turns(msgspec.to_builtins(turns))


def check_name(name: str) -> None:
    """Check a name of the user's choice.

    Raises:
        K2Error: if it cannot be the name of a file.
    """
    if not _NAME.fullmatch(name):
        raise K2Error(f"'{name}' cannot be a name", "letters, digits and . _ - are allowed")


def title_of(question: str) -> str:
    """Return the first line of a question that has text, shortened."""
    line = next((line.strip() for line in question.splitlines() if line.strip()), "")
    return line if len(line) <= 60 else f"{line[:59]}…"


def automatic_name(title: str, at: float) -> str:
    """Make a name from the day and the words of a title."""
    words = re.findall(r"[a-z0-9]+", title.lower())[:_MOST_WORDS]
    day = time.strftime("%Y-%m-%d", time.localtime(at))
    return "-".join([day, *words])[:60].rstrip("-") if words else f"{day}-chat"


def as_markdown(conversation: Conversation) -> str:
    """Export a conversation without its reasoning."""
    day = time.strftime("%Y-%m-%d", time.localtime(conversation.created))
    parts = [f"# {conversation.title or conversation.name}", f"{conversation.model}, {day}"]
    if conversation.system:
        parts += ["## System", conversation.system]
    for turn in conversation.turns:
        match turn.role:
            case "user":
                parts += ["## You", turn.content]
            case "tool":
                parts += ["## Result", _fenced(turn.content)]
            case _:
                calls = [
                    _fenced(f"{call.function.name} {call.function.arguments}")
                    for call in turn.tool_calls
                ]
                parts += [
                    f"## {conversation.model}",
                    *([turn.content] if turn.content else []),
                    *calls,
                ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _contains(conversation: Conversation, wanted: str) -> bool:
    if not wanted:
        return True
    texts = [conversation.name, conversation.title, *(turn.content for turn in conversation.turns)]
    return any(wanted in text.casefold() for text in texts)
