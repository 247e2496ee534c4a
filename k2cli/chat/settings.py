"""Settings of a chat: values that ``/set`` changes, and the file of defaults.

The file is ``chat.toml`` in k2's folder of configuration. It has the names of ``/set`` and
``system``, the system prompt; options of the command line count more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from k2cli.client.client import GenerationOptions
from k2cli.errors import K2Error, UsageError
from k2cli.files import read_regular
from k2cli.units import parse_tokens

FILE_NAME = "chat.toml"
_LIMIT_BYTES = 2**20
_SYSTEM = "system"
_UNSET = ("default", "none")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Settings of a chat.

    Attributes:
        options: those that the server gets; None leaves a value to it.
        stats: True to show a line of figures after each answer.
        show_thinking: True to show the text of the reasoning as it arrives.
        system: the system prompt of new conversations.
    """

    options: GenerationOptions = field(default_factory=GenerationOptions)
    stats: bool = True
    show_thinking: bool = False
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: how its text is read, and which values are allowed."""

    parse: Callable[[str], Any]
    values: str
    of_server: bool = True


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isnan(value):
            raise ValueError
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _tokens(text: str) -> int:
    try:
        value = parse_tokens(text)
    except K2Error as error:
        raise ValueError from error
    if not 1 <= value <= 2**31:
        raise ValueError
    return value


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError
    return text == "on"


def _effort(text: str) -> str:
    if text not in _EFFORTS:
        raise ValueError
    return text


SETTINGS: dict[str, Setting] = {
    "temperature": Setting(_number(0, 2), "0 to 2"),
    "top_p": Setting(_number(0, 1), "0 to 1"),
    "top_k": Setting(_whole(1, 2**31), "1 or more"),
    "min_p": Setting(_number(0, 1), "0 to 1"),
    "repetition_penalty": Setting(_number(0.01, 10), "0.01 to 10"),
    "max_tokens": Setting(_tokens, "1 or more, such as 256 or 4k"),
    "seed": Setting(_whole(-(2**63), 2**63 - 1), "a whole number"),
    "reasoning_effort": Setting(_effort, ", ".join(_EFFORTS)),
    "stats": Setting(_switch, "on, off", of_server=False),
    "show_thinking": Setting(_switch, "on, off", of_server=False),
}


def changed(settings: ChatSettings, name: str, text: str) -> ChatSettings:
    """Return the settings with one changed; ``default`` unsets it.

    Raises:
        K2Error: if there is no such setting, or it does not allow the value.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise K2Error(f"there is no setting '{name}'", f"one of: {', '.join(SETTINGS)}")
    if text in _UNSET and not (text == "none" and name == "reasoning_effort"):
        value = getattr(ChatSettings(), name) if not setting.of_server else None
    else:
        try:
            value = setting.parse(text)
        except (ValueError, OverflowError):
            raise K2Error(
                f"'{text}' is no value of {name}", f"{setting.values}; or default"
            ) from None
    if setting.of_server:
        return replace(settings, options=replace(settings.options, **{name: value}))
    own: dict[str, Any] = {name: value}
    return replace(settings, **own)


def described(settings: ChatSettings) -> list[tuple[str, str]]:
    """Return each setting with its value and those that are allowed."""
    rows = []
    for name, setting in SETTINGS.items():
        value = getattr(settings.options if setting.of_server else settings, name)
        text = "default" if value is None else str(value)
        if isinstance(value, bool):
            text = "on" if value else "off"
        rows.append((name, f"{text} ({setting.values})"))
    return rows


def read_settings(path: Path) -> ChatSettings:
    """Read the file of defaults; the built-in ones if there is none.

    Raises:
        UsageError: if it cannot be read, or has another name or value than ``/set`` allows.
    """
    try:
        text = read_regular(path, _LIMIT_BYTES, follow_links=True).decode()
        import tomllib  # slow to import

        document = tomllib.loads(text)
    except FileNotFoundError:
        return ChatSettings()
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"'{path}' cannot be read: {error}", "correct the file, or move it"
        ) from error
    settings = ChatSettings()
    for name, value in document.items():
        if name == _SYSTEM and isinstance(value, str):
            settings = replace(settings, system=value)
            continue
        try:
            settings = changed(settings, name, _as_text(value))
        except K2Error as error:
            raise UsageError(f"'{path}': {error.message}", error.hint) from error
    return settings


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
