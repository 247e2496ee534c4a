"""The ``/commands`` of a chat: what ``/help`` shows, and what the guide says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from k2cli.chat.commands import COMMANDS, show_help
from k2cli.chat.tool_commands import TOOL_COMMANDS

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "chat.md"


def test_help_and_the_guide_list_every_command() -> None:
    commands, shown = {**COMMANDS, **TOOL_COMMANDS}, list[tuple[str, str]]()
    terminal = SimpleNamespace(table=shown.extend)
    show_help(SimpleNamespace(commands=commands, terminal=terminal), "")  # type: ignore[arg-type]
    listed = {row[0].split()[0] for row in shown}
    text = GUIDE.read_text()
    for command in commands.values():
        assert command.name in listed
        assert f"`{command.name}" in text
