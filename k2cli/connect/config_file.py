"""A configuration file of another program: read, changed, shown as a difference, and replaced.

The file may be the work of years, so it is never damaged. What k2 cannot read, or may not replace,
is refused. Before a file is replaced, the new text is parsed: it must say what the old one said,
and what the patch adds. The old file stays beside the new one, under another name.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import stat
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k2cli.connect.formats.jsonc import edit_json, parse_json
from k2cli.connect.formats.patch import ConfigError, Patch, apply_patch, settled
from k2cli.connect.formats.toml import edit_toml, parse_toml
from k2cli.connect.formats.yaml import edit_yaml, parse_yaml
from k2cli.errors import K2Error
from k2cli.files import name_with, read_regular, unwritable, write_atomically
from k2cli.units import KIB

Format = Literal["json", "jsonc", "toml", "yaml"]
_LIMIT_BYTES = 256 * KIB
_BOM = "\ufeff"
_COMMENT = re.compile(r"\s*(#|//)")
_SECRET = re.compile(
    r"""(?ix)
    ((?:key|token|secret|password|authorization)["']?\s*[:=]\s*)
    (?: (?P<quote>["']) (?![{$]) [^"'\n]{12,} (?P=quote)
      | ["']? (?![{$"']) (?: (?:bearer|basic|token) [ ]+ )? [^\s"',]{12,} )"""
)
"""The value of a setting that may be a secret: in quotes, or up to a space; not a reference."""
_PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A change of one file that an adapter wants; ``private`` if the patch holds a key."""

    path: Path
    format: Format
    patch: Patch
    private: bool = False


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """A file as it is and as it will be.

    Attributes:
        path: the file as the agent knows it.
        target: the file that is replaced: ``path``, or where it leads to if it is a link.
        old: the bytes of the file; None if there is none yet.
        new: the bytes that will be in it.
        mode: the permissions that it will have; None for those of new files.
    """

    path: Path
    target: Path
    old: bytes | None
    new: bytes
    mode: int | None

    @property
    def changes(self) -> bool:
        """True if the file does not say all this already."""
        return self.old != self.new

    def difference(self, secret: str | None = None) -> str:
        """Return the unified difference of the texts, with keys and passwords hidden.

        Args:
            secret: a text to hide wherever it is.
        """
        before = [] if self.old is None else _lines(self.old)
        name = str(self.target)
        lines = difflib.unified_diff(
            before, _lines(self.new), name if before else os.devnull, name, n=2
        )
        text = "".join(lines)
        return _SECRET.sub(
            r"\1\g<quote>(hidden)\g<quote>", text.replace(secret, "(hidden)") if secret else text
        )


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was replaced or made; ``copy`` is the old one, None if there was none."""

    path: Path
    copy: Path | None

    @property
    def undo(self) -> str:
        """Return the command that brings back what was there before."""
        if self.copy is None:
            return shlex.join(["rm", str(self.path)])
        return shlex.join(["mv", str(self.copy), str(self.path)])


def _lines(data: bytes) -> list[str]:
    lines = data.decode().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n\\ No newline at end of file\n"
    return lines


def home_folder() -> Path:
    """Return the user's home folder, where agents have their configuration.

    Raises:
        K2Error: if there is none.
    """
    named = os.environ.get("HOME")
    if named is not None and not os.path.isabs(named):
        # Python would take / for an empty one.
        raise K2Error(
            f"HOME is '{named}', which is no absolute path", "set HOME to a folder of yours"
        )
    try:
        return Path.home()
    except RuntimeError:
        raise K2Error(
            f"HOME is not set, and user {os.getuid()} has no home folder",
            "set HOME to a folder of yours",
        ) from None


def file_text(change: ConfigChange) -> str:
    """Return the text of a file that has the settings of a patch and nothing else."""
    return _edit("", change.format, settled(change.patch, None))


def plan_change(change: ConfigChange) -> PlannedChange:
    """Compute the new content of a file; nothing is written.

    Raises:
        ConfigError: if the file cannot be read, or may not or cannot be changed.
    """
    target, found = _target(change.path)
    if found is None:
        new = _edited("", change, change.path)
        mode = _PRIVATE if change.private else None
        return PlannedChange(change.path, target, None, new.encode(), mode)
    old = _content(target)
    text = _decoded(old, target)
    bom = _BOM if text.startswith(_BOM) else ""
    new = bom + _with_line_ends(text.removeprefix(_BOM), change, target)
    mode = stat.S_IMODE(found.st_mode)
    if change.private:
        mode &= _PRIVATE
    return PlannedChange(change.path, target, old, new.encode(), mode)


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """Return the file to replace and its state; None if it is not there yet.

    Raises:
        ConfigError: if it is none that k2 may replace.
    """
    try:
        link = path.is_symlink()
        target = path.resolve(strict=True) if link else path
        found = target.lstat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"'{path}' is a link to '{os.readlink(path)}', which does not exist",
                f"rm {shlex.quote(str(path))}, or make the file that it leads to",
            ) from None
        return path, None
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise ConfigError(f"'{path}' cannot be read: {_reason(error)}") from error
    shown = f"'{path}'" + (f", a link to '{target}'," if link else "")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{shown} is not a file", f"ls -ld {shlex.quote(str(target))}")
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{shown} belongs to another user (id {found.st_uid})",
            f"change it by hand, or: sudo chown {os.geteuid()} {shlex.quote(str(target))}",
        )
    if not found.st_mode & stat.S_IWUSR:
        raise ConfigError(
            f"{shown} is read-only: its mode is {stat.S_IMODE(found.st_mode):04o}",
            f"change it where it is made, or: chmod u+w {shlex.quote(str(target))}",
        )
    if found.st_nlink > 1:
        raise ConfigError(
            f"{shown} has {found.st_nlink} names (hard links), which a replaced file would not",
            f"change it by hand; its other names: find ~ -samefile {shlex.quote(str(target))}",
        )
    return target, found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _content(target: Path) -> bytes:
    try:
        return read_regular(target, _LIMIT_BYTES)
    except OSError as error:
        raise ConfigError(f"'{target}' cannot be read: {_reason(error)}") from error


def _decoded(data: bytes, target: Path) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'{target}' is not UTF-8: byte {error.start} is {data[error.start]:#04x}",
            f"see what it is: file {shlex.quote(str(target))}",
        ) from None
    if "\0" in text:
        raise ConfigError(f"'{target}' has a null byte, so it is not a text")
    return text


def _with_line_ends(text: str, change: ConfigChange, target: Path) -> str:
    """Return the new text of a file, with the line ends of the old one.

    The libraries for TOML and YAML write their own, and so mix them.
    """
    plain = text.replace("\r\n", "\n")
    if "\r" in plain or text.count("\r\n") != plain.count("\n"):
        return _edited(text, change, target)  # mixed before: they stay as they are
    new = _edited(plain, change, target)
    return new.replace("\n", "\r\n") if "\r" in text else new


def _edited(text: str, change: ConfigChange, target: Path) -> str:
    """Return the new text of a file, checked.

    Raises:
        ConfigError: if the old text is malformed or contradicts the patch, or the new one is wrong.
    """
    try:
        before = _parse(text, change.format)
        patch = settled(change.patch, before)
        wanted = apply_patch(before, patch)
        if text.strip() and before == wanted:
            return text
        new = _edit(text, change.format, patch)
        _check(text, new, wanted, change.format)
    except ConfigError as error:
        raise ConfigError(
            f"'{target}' is left as it is: {error.message}",
            "repair the file, or add the settings by hand: the same command without --write "
            "prints them",
        ) from error
    return new


def _parse(text: str, format: Format) -> Any:
    match format:
        case "json":
            return parse_json(text, comments=False)
        case "jsonc":
            return parse_json(text)
        case "toml":
            return parse_toml(text)
        case "yaml":
            return parse_yaml(text)


def _edit(text: str, format: Format, patch: Patch) -> str:
    match format:
        case "json":
            return edit_json(text, patch, comments=False)
        case "jsonc":
            return edit_json(text, patch)
        case "toml":
            return edit_toml(text, patch)
        case "yaml":
            return edit_yaml(text, patch)


def _check(old: str, new: str, wanted: dict[str, Any], format: Format) -> None:
    """Check that a new text says what it must, and has all lines of comments of the old one.

    Raises:
        ConfigError: if not.
    """
    if _parse(new, format) != wanted:
        raise ConfigError("the change would alter other settings")
    if _comments(old) - _comments(new):
        raise ConfigError("the change would lose a comment")


def _comments(text: str) -> Counter[str]:
    return Counter(line.strip() for line in text.splitlines() if _COMMENT.match(line))


def write_change(planned: PlannedChange) -> Written:
    """Keep a copy of the old file, and replace it.

    Raises:
        ConfigError: if somebody else has changed the file since it was read.
        K2Error: if it cannot be written.
    """
    target = planned.target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_unchanged(planned)
        copy = None if planned.old is None else _keep(target, planned.old, planned.mode)
        write_atomically(target, planned.new, planned.mode)
    except OSError as error:
        raise unwritable(error, Path(error.filename or target)) from error
    return Written(target, copy)


def _check_unchanged(planned: PlannedChange) -> None:
    target, found = _target(planned.path)
    current = None if found is None else _content(target)
    if target != planned.target or current != planned.old:
        raise ConfigError(f"'{planned.target}' was changed meanwhile", "try again")


def _keep(target: Path, content: bytes, mode: int | None) -> Path:
    """Write a copy of a file beside it, under a name that is not taken yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        ending = f".k2-{stamp}" + (f"-{number}" if number else "")
        copy = target.with_name(name_with(target.name, ending))
        try:
            descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        try:
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                file.write(content)
        except BaseException:
            copy.unlink()  # a part of a file must not pass for a copy of it
            raise
        return copy
    raise FileExistsError(17, "copies of it are there already", str(copy))
