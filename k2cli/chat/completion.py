"""Completion of commands, paths, conversations, models and settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from k2cli.chat.settings import SETTINGS
from k2cli.chat.terminal import Completion
from k2cli.settings import expand_home

_MOST_ENTRIES = 2000
_MENTION = re.compile(r"""(?<!\S)@("?)([^"\s]*)$""")


@dataclass(slots=True)
class Completer:
    """Completer of what a user types.

    Attributes:
        commands: meanings of the commands by name.
        words: words that may follow a command.
    """

    commands: dict[str, str]
    words: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, text: str) -> Iterator[Completion]:
        """Yield the completions of the text before the cursor."""
        if mention := _MENTION.search(text):
            yield from _paths(mention.group(2))
            return
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command, meaning in self.commands.items():
                if command.startswith(name):
                    yield Completion(command, len(name), command, meaning)
        elif name == "/read":
            yield from _paths(re.split(r"\s", argument)[-1].lstrip("\"'"))
        elif name == "/set":
            yield from _matching(SETTINGS, argument)
        else:
            yield from _matching(self.words.get(name, []), argument)


def _matching(words: Iterable[str], begun: str) -> Iterator[Completion]:
    for word in words:
        if word.startswith(begun):
            yield Completion(word, len(begun), word)


def _paths(begun: str) -> Iterator[Completion]:
    """Yield the files and folders whose paths begin with a text."""
    folder, _, start = begun.rpartition("/")
    base = f"{folder}/" if "/" in begun else ""
    try:
        with os.scandir(expand_home(base or ".")) as entries:
            some = islice(entries, _MOST_ENTRIES)
            found = sorted((entry.name, entry.is_dir()) for entry in some)
    except OSError:
        return
    for name, is_folder in found:
        hidden = name.startswith(".") and not start.startswith(".")
        if name.startswith(start) and not hidden and name.isprintable():
            shown = f"{name}/" if is_folder else name
            yield Completion(f"{base}{shown}", len(begun), shown)
