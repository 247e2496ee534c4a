"""The ``/commands`` of a chat that concern tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2cli.chat.commands import Command, command
from k2cli.chat.tool_turns import result_number
from k2cli.errors import K2Error

if TYPE_CHECKING:
    from k2cli.chat.interactive import Chat

TOOL_COMMANDS: dict[str, Command] = {}
"""The commands of this module by their names."""


@command("/tools", "[on|off|allow NAME]", table=TOOL_COMMANDS)
def tools(chat: Chat, argument: str) -> None:
    """List servers and tools; switch one on or off; allow a tool in this conversation."""
    if not argument:
        _list(chat)
        return
    what, _, rest = argument.partition(" ")
    names = rest.split()
    if what not in ("on", "off", "allow") or not names:
        raise K2Error(
            f"'/tools {argument}' is not known",
            "/tools on NAME, /tools off NAME, /tools allow NAME",
        )
    if what == "on":
        chat.turn_on(names)
    for name in names:
        if what == "off":
            chat.tools.turn_off(name)
            chat.terminal.note(f"off: {name}")
        elif what == "allow":
            chat.tools.allow(name)
            chat.terminal.note(f"allowed in this conversation: {name}")
    complete_names(chat)


def _list(chat: Chat) -> None:
    file, ended = chat.tools.read_file(), chat.tools.ended()
    rows = []
    for name in file.names:
        if name not in chat.tools.servers:
            rows.append((name, "off"))
            continue
        rows.append((name, f"has ended: {ended[name]}" if name in ended else "on"))
        on = {tool.name for tool in chat.tools.tools}
        for tool in chat.tools.tools_of(name):
            state = "off" if tool.name not in on else "asks"
            if state == "asks" and chat.tools.is_allowed(tool.name):
                state = "allowed"
            meaning = tool.info.description.strip().splitlines()
            rows.append((tool.name, f"{state}: {meaning[0][:100] if meaning else ''}"))
    if not rows:
        chat.terminal.note(f"'{file.path}' names no server")
    chat.terminal.table(rows)
    complete_names(chat)


def complete_names(chat: Chat) -> None:
    """Let Tab complete what may follow ``/tools``."""
    on = [*chat.tools.servers, *(tool.name for tool in chat.tools.tools)]
    try:
        known = chat.tools.read_file().names
    except K2Error:
        known = []
    chat.completer.words["/tools"] = [
        *(f"on {name}" for name in known),
        *(f"off {name}" for name in on),
        *(f"allow {tool.name}" for tool in chat.tools.tools),
    ]


@command("/result", "[NUMBER]", table=TOOL_COMMANDS)
def result(chat: Chat, argument: str) -> None:
    """Show the last result of a tool whole; 2: the last but one."""
    chat.terminal.show_result(result_number(chat.session, argument))
