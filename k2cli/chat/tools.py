"""Tools of one chat: which servers are on, what the model may call, and what the user allowed.

Nothing is on unless the user names it. A tool keeps the description with which its server was
switched on, so that a server cannot change what was allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.chat.calls import ToolCall
from k2cli.errors import K2Error, UsageError
from k2cli.units import KIB, format_bytes, one_line

if TYPE_CHECKING:
    from k2cli.client.client import ModelInfo
    from k2cli.tools.host import Stopped, ToolHost
    from k2cli.tools.messages import Connected, ToolInfo
    from k2cli.tools.settings import ServerFile, ServerSettings

MOST_ROUNDS = 25
"""Answers with calls that follow one message of the user."""

_MOST_DEFINITION_BYTES = 256 * KIB
_MOST_NAME_LETTERS = 64
"""Of a function's name in OpenAI's API."""

_BETWEEN = "__"


def cannot_call(model: ModelInfo) -> str:
    """Return the warning for a model whose server says that it calls no tools."""
    return (
        f"{one_line(model.name)} cannot call tools: its server has no form of calls for it, so "
        "that questions may be refused; serve a model that was trained for tools"
    )


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool under the name by which the model calls it."""

    name: str
    server: str
    info: ToolInfo

    @property
    def definition(self) -> dict[str, Any]:
        """The tool in the form of OpenAI's API."""
        function = {
            "name": self.name,
            "description": self.info.description,
            "parameters": {"type": "object", "properties": {}, **self.info.schema},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a call; ``whole_bytes`` is its size before it was cut."""

    text: str
    failed: bool = False
    whole_bytes: int = 0


class ToolBox:
    """The tools of one chat.

    Args:
        file: the file of servers, which is read when the first one is wanted.
        always_allowed: tools that are called without a question, in every conversation.
    """

    def __init__(self, file: Path, always_allowed: Collection[str] = ()) -> None:
        self._path = file
        self._started: ToolHost | None = None
        self._servers: dict[str, ServerSettings] = {}
        self._tools: dict[str, Tool] = {}
        self._off: set[str] = set()
        self._always_allowed = frozenset(always_allowed)
        self._allowed: set[str] = set()

    def close(self) -> None:
        """End all servers."""
        if self._started is not None:
            self._started.close()

    @property
    def _host(self) -> ToolHost:
        if self._started is None:
            from k2cli.tools.host import ToolHost  # few chats have tools

            self._started = ToolHost()
        return self._started

    # --- on and off -----------------------------------------------------------------------------

    def read_file(self) -> ServerFile:
        """Read the file of servers.

        Raises:
            UsageError: if it cannot be used.
        """
        from k2cli.tools.settings import read_server_file

        return read_server_file(self._path)

    @property
    def servers(self) -> list[str]:
        """Servers that are on."""
        return list(self._servers)

    @property
    def tools(self) -> list[Tool]:
        """Tools that the model may call."""
        return [tool for tool in self._tools.values() if tool.name not in self._off]

    def tools_of(self, server: str) -> list[Tool]:
        """Return the tools of a server that is on, those that are off too."""
        return [tool for tool in self._tools.values() if tool.server == server]

    def definitions(self) -> list[dict[str, Any]]:
        """Return the tools in the form of OpenAI's API."""
        return [tool.definition for tool in self.tools]

    def ended(self) -> dict[str, str]:
        """Return the servers that are on but have ended, with the reason."""
        try:
            self._host.look()
        except K2Error as error:
            return dict.fromkeys(self._servers, error.message)
        return {name: why for name, why in self._host.ended.items() if name in self._servers}

    def turn_on(self, names: Sequence[str], stopped: Stopped) -> list[str]:
        """Switch servers on, or single tools again; return what the user should know.

        Raises:
            K2Error: if a name is unknown, or none of the servers can be used.
            KeyboardInterrupt: if the user stops it.
        """
        again = [name for name in names if name in self._tools]
        self._off.difference_update(again)
        wanted = [name for name in dict.fromkeys(names) if name not in again]
        if not wanted:
            return [f"on: {', '.join(again)}"]
        from k2cli.tools.messages import Connected

        file = self.read_file()
        settings = [file.server(name) for name in wanted]
        for each in settings:
            if each.name in self._servers:  # it is started anew
                self.turn_off(each.name)
        notes, failures = [], []
        for name, answer in self._host.connect(settings, stopped).items():
            if isinstance(answer, Connected):
                server = next(each for each in settings if each.name == name)
                notes += self._add(server, answer)
            else:
                failures.append(f"server '{name}': {one_line(answer.reason)}")
        if failures and len(failures) == len(settings):
            raise K2Error("; ".join(failures), f"see '{self._path}'")
        return [*notes, *failures]

    def _add(self, server: ServerSettings, answer: Connected) -> list[str]:
        """Add the tools of a server that is ready."""
        self._servers[server.name] = server
        left_out = list(answer.left_out)
        room = _MOST_DEFINITION_BYTES - len(json.dumps(self.definitions()))
        added = []
        for info in answer.tools:
            tool = Tool(_exposed_name(server.name, info.name), server.name, info)
            room -= len(json.dumps(tool.definition))
            if tool.name in self._tools:
                left_out.append(f"'{one_line(info.name)}': another tool is called {tool.name}")
            elif room < 0:
                most = format_bytes(_MOST_DEFINITION_BYTES)
                left_out.append(
                    f"'{one_line(info.name)}': all tools together have more than {most}"
                )
            else:
                self._tools[tool.name] = tool
                added.append(tool.name)
        notes = [f"on: {server.name} ({', '.join(added) or 'no tools'})"]
        if left_out:
            notes.append(f"left out of {server.name}: {'; '.join(left_out)}")
        return notes

    def turn_off(self, name: str) -> None:
        """Switch a server or one tool off.

        Raises:
            K2Error: if it is not on.
        """
        if name in self._servers:
            del self._servers[name]
            self._tools = {key: tool for key, tool in self._tools.items() if tool.server != name}
            self._host.disconnect(name)
        elif name in self._tools:
            self._off.add(name)
        else:
            raise K2Error(f"'{one_line(name)}' is not on", "/tools lists what is on")

    # --- permission -----------------------------------------------------------------------------

    def is_allowed(self, name: str) -> bool:
        """True if a tool is called without a question."""
        return name in self._always_allowed or name in self._allowed

    def allow(self, name: str) -> None:
        """Allow a tool until the end of the conversation.

        Raises:
            K2Error: if there is no such tool.
        """
        if name not in self._tools:
            raise K2Error(f"there is no tool '{one_line(name)}'", "/tools lists them")
        self._allowed.add(name)

    def forget_allowed(self) -> None:
        """Ask for everything again, since another conversation begins."""
        self._allowed.clear()

    def check_allowed_names(self) -> None:
        """Check that the tools of the command line exist.

        Raises:
            UsageError: if one does not.
        """
        for name in sorted(self._always_allowed - self._tools.keys()):
            known = ", ".join(self._tools) or "none"
            raise UsageError(
                f"--allow-tool '{one_line(name)}' is no tool; there are {known}",
                f"--allow-tool {next(iter(self._tools), 'SERVER__TOOL')}",
            )

    # --- calls ----------------------------------------------------------------------------------

    def refusal(self, call: ToolCall) -> str:
        """Return why a call cannot be made at all; "" if it can."""
        tool = self._tools.get(call.name)
        if tool is None or tool.name in self._off:
            known = ", ".join(each.name for each in self.tools) or "none"
            return f"There is no tool of this name. The tools are: {known}."
        if call.parsed() is None:
            return "The arguments are not a JSON object."
        return ""

    def run(self, call: ToolCall, stopped: Stopped) -> ToolResult:
        """Make a call that ``refusal`` does not refuse.

        Raises:
            KeyboardInterrupt: if the user stops it.
        """
        from k2cli.tools.messages import CallDone

        tool = self._tools[call.name]
        arguments = call.arguments.strip() or "{}"
        seconds = self._servers[tool.server].timeout_seconds
        try:
            answer = self._host.call((tool.server, tool.info.name, arguments), seconds, stopped)
        except K2Error as error:
            return ToolResult(f"The tool failed: {error.message}.", failed=True)
        if isinstance(answer, CallDone):
            return ToolResult(answer.text, answer.is_error, answer.whole_bytes)
        reason = self._host.ended.get(tool.server)
        why = (
            f"{answer.reason}: {reason}"
            if reason and reason not in answer.reason
            else answer.reason
        )
        return ToolResult(f"The tool failed: {why}", failed=True)


def _exposed_name(server: str, tool: str) -> str:
    """Return the name under which the model calls a tool, of characters that every API takes."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{server}{_BETWEEN}{tool}")[:_MOST_NAME_LETTERS]
