"""Editing of TOML with tomlkit, which keeps comments, order and spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.connect.formats.patch import REMOVE, ConfigError, ListItem, Patch, plain


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ConfigError: if the text is malformed.
    """
    import tomllib  # slow to import

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise ConfigError("it is nested too deeply" if deep else str(error)) from error


def edit_toml(text: str, patch: Patch) -> str:
    """Return the text with a patch carried out.

    Raises:
        ConfigError: if tomlkit cannot read the text or make the change.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
        _patch(document, patch)
        return tomlkit.dumps(document)
    except (TOMLKitError, RecursionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"tomlkit cannot change it: {error}") from error


def _patch(table: Any, patch: Patch) -> None:
    import tomlkit

    for name, value in patch.items():
        if value is REMOVE:
            if name in table:
                del table[name]
        elif isinstance(value, ListItem):
            raise TypeError("lists of tables are not supported")
        elif isinstance(value, Mapping):
            if name not in table:
                # A table that only holds tables gets no header of its own.
                holds = bool(value) and all(isinstance(each, Mapping) for each in value.values())
                table[name] = tomlkit.table(is_super_table=holds)
            _patch(table[name], value)
        elif name not in table or table[name] != value:
            table[name] = plain(value)
