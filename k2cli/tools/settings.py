"""MCP servers of the user's file ``mcp.json``, in the form that other programs use.

The file names programs that k2 starts with the user's rights, so nobody else may write it. Nothing
in it is started unless the user asks for it by name.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from k2cli.errors import UsageError
from k2cli.files import decode_json, read_regular
from k2cli.units import MIB, one_line

FILE_NAME = "mcp.json"
DEFAULT_TIMEOUT_SECONDS = 60.0
MOST_TIMEOUT_SECONDS = 3600.0
_MOST_SERVERS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"([!-~]([ -~\t]*[!-~])?)?")
_EXAMPLE = '{"mcpServers": {"time": {"command": "mcp-server-time"}}}'


class ServerSettings(msgspec.Struct, frozen=True):
    """One server: a program that is started, or the URL of one that runs.

    Attributes:
        env: variables of the program beside those that every program needs.
        headers: sent with each request to the URL.
        timeout_seconds: for one call of a tool.
    """

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    url: str = ""
    headers: dict[str, str] = {}
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS

    @property
    def place(self) -> str:
        """The command or the host, without arguments and headers, which may be secret."""
        return self.command or urlsplit(self.url).netloc.rpartition("@")[2]


class _Entry(msgspec.Struct, frozen=True):
    """One entry of the file; members that only other programs know are ignored."""

    command: str = ""
    args: list[str] = []
    env: dict[str, str] = {}
    url: str = ""
    headers: dict[str, str] = {}
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS


class _File(msgspec.Struct, frozen=True):
    servers: dict[str, msgspec.Raw] = msgspec.field(name="mcpServers", default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerFile:
    """The servers of a file, by name; those that cannot be used, with the reason."""

    path: Path
    entries: Mapping[str, msgspec.Raw]
    mode: int

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def server(self, name: str) -> ServerSettings:
        """Return the settings of one server.

        Raises:
            UsageError: if there is none of that name, or its entry cannot be used.
        """
        raw = self.entries.get(name)
        if raw is None:
            known = ", ".join(self.names) or "none"
            raise UsageError(
                f"'{self.path}' has no server '{one_line(name)}'; it has {known}",
                f"add it to the file: {_EXAMPLE}",
            )
        try:
            entry = decode_json(bytes(raw), type=_Entry)
        except msgspec.MsgspecError as error:
            raise self._wrong(name, str(error)) from error
        return self._checked(name, entry)

    def _checked(self, name: str, entry: _Entry) -> ServerSettings:
        if not _NAME.fullmatch(name):
            raise self._wrong(name, "a name has at most 32 letters, digits, - and _")
        if bool(entry.command) == bool(entry.url):
            raise self._wrong(name, "it needs either 'command' or 'url'")
        if not 0 < entry.timeout_seconds <= MOST_TIMEOUT_SECONDS:
            raise self._wrong(
                name, f"'timeout_seconds' is not between 0 and {MOST_TIMEOUT_SECONDS:.0f}"
            )
        if (entry.env or entry.headers) and self.mode & 0o077:
            raise UsageError(
                f"'{self.path}' can be read by other users, and server '{name}' has "
                f"{'variables' if entry.env else 'headers'} that may be secret",
                f"chmod 600 '{self.path}'",
            )
        url = self._filled(name, entry.url)
        if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise self._wrong(name, f"'{one_line(entry.url)}' is not an HTTP address")
        texts = (entry.command, *entry.args, *entry.env, *entry.env.values())
        if any("\0" in text for text in texts) or any("=" in variable for variable in entry.env):
            raise self._wrong(name, "its command has characters that no program can be given")
        headers = {key: self._filled(name, value) for key, value in entry.headers.items()}
        for key, value in headers.items():
            # The HTTP client would name the value, which may be secret.
            if not _HEADER_NAME.fullmatch(key) or not _HEADER_VALUE.fullmatch(value):
                raise self._wrong(
                    name, f"header '{one_line(key)}' has characters that a header cannot have"
                )
        return ServerSettings(
            name,
            self._filled(name, entry.command),
            tuple(self._filled(name, each) for each in entry.args),
            {key: self._filled(name, value) for key, value in entry.env.items()},
            url,
            headers,
            entry.timeout_seconds,
        )

    def _filled(self, name: str, text: str) -> str:
        """Put variables of the environment in place of ``${NAME}``, so that no secret is stored."""

        def value(match: re.Match[str]) -> str:
            if (found := os.environ.get(match[1])) is None:
                raise self._wrong(name, f"the variable {match[1]} is not set")
            return found

        return _VARIABLE.sub(value, text)

    def _wrong(self, name: str, problem: str) -> UsageError:
        return UsageError(
            f"server '{one_line(name)}' of '{self.path}': {problem}", "correct the file"
        )


def read_server_file(path: Path) -> ServerFile:
    """Read the file of servers.

    Raises:
        UsageError: if there is none, it cannot be read, or somebody else may write it.
    """
    try:
        mode = _checked_mode(path)
        file = decode_json(read_regular(path, MIB, follow_links=True), type=_File)
    except FileNotFoundError as error:
        message = f"there is no '{path}', which names the MCP servers"
        example = f"echo {shlex.quote(_EXAMPLE)} > {shlex.quote(str(path))}"
        if not path.parent.is_dir():
            example = f"mkdir -p {shlex.quote(str(path.parent))} && {example}"
        raise UsageError(message, example) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}", "correct the file") from error
    if len(file.servers) > _MOST_SERVERS:
        raise UsageError(f"'{path}' has more than {_MOST_SERVERS} servers", "remove some")
    return ServerFile(path, file.servers, mode)


def _checked_mode(path: Path) -> int:
    """Return the permissions of a file that only its owner may write, and who is this user."""
    for each in (path, path.parent):
        found = each.stat()
        what = "file" if each == path else "folder"
        if found.st_uid not in (os.geteuid(), 0):
            raise UsageError(
                f"the {what} '{each}' belongs to another user, who could have any program started",
                f"chown {os.geteuid()} '{each}'",
            )
        if found.st_mode & 0o022:
            raise UsageError(
                f"the {what} '{each}' can be written by other users, who could have any program "
                "started",
                f"chmod go-w '{each}'",
            )
    return stat.S_IMODE(path.stat().st_mode)
