"""Lines that set variables, in the syntax of a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from k2cli.connect.endpoint import Endpoint
from k2cli.connect.settings import Value

Shell = Literal["sh", "fish", "powershell"]
SHELLS: tuple[Shell, ...] = get_args(Shell)
_PLAIN = re.compile(r"[\w+=:./-]+", re.ASCII)


def shell_of(path: str) -> Shell:
    """Return the syntax for the shell of a path such as that in ``SHELL``."""
    return "fish" if path.rpartition("/")[2] == "fish" else "sh"


def quoted(text: str, shell: Shell) -> str:
    """Quote a word so that the shell takes it as it is."""
    match shell:
        case "sh":
            return shlex.quote(text)
        case "fish":
            if _PLAIN.fullmatch(text):
                return text
            return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
        case "powershell":
            return "'" + re.sub("(['‘’‚‛])", r"\1\1", text) + "'"


def command_line(words: Sequence[str], shell: Shell) -> str:
    """Return a command with its arguments quoted."""
    if shell != "powershell":
        return " ".join(quoted(word, shell) for word in words)
    parts = [word if _PLAIN.fullmatch(word) else quoted(word, shell) for word in words]
    return " ".join(parts) if _PLAIN.fullmatch(words[0]) else "& " + " ".join(parts)


def lines(
    environment: Mapping[str, Value], unset: Sequence[str], endpoint: Endpoint, shell: Shell
) -> Iterator[str]:
    """Yield one line per variable; a key is the output of the command that prints it."""
    for name in unset:
        yield {
            "sh": f"unset {name}",
            "fish": f"set -e {name}",
            "powershell": f"Remove-Item Env:{name} -ErrorAction Ignore",
        }[shell]
    for name, value in environment.items():
        yield _assignment(name, value, endpoint, shell)


def _assignment(name: str, value: Value, endpoint: Endpoint, shell: Shell) -> str:
    if isinstance(value, str):
        text = quoted(value, shell)
    else:
        assert endpoint.key is not None
        command = command_line(endpoint.key.command, shell)
        text = {"sh": f'"$({command})"', "fish": f"({command})", "powershell": f"({command})"}[
            shell
        ]
    return {
        "sh": f"export {name}={text}",
        "fish": f"set -gx {name} {text}",
        "powershell": f"$env:{name} = {text}",
    }[shell]
