"""Changes of a configuration as data, and their effect on parsed data.

A patch is a tree of mappings: it names the members that are set, and nothing else of a file
changes. Each format carries out a patch on its text; ``apply_patch`` says what the parsed result
must be, so that every edit of a text can be checked before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from k2cli.errors import K2Error


class ConfigError(K2Error):
    """A configuration file that k2 does not change, since it could damage it."""


class _Remove:
    def __repr__(self) -> str:
        return "REMOVE"


REMOVE: Final = _Remove()
"""Stands in place of a value: the member is removed, if it is there."""


@dataclass(frozen=True, slots=True)
class ListItem:
    """One item of a list, found by a member, in place of the list; a new one goes to the end."""

    key: str
    members: Mapping[str, Any]

    @property
    def identity(self) -> Any:
        """The value of the member by which the item is found."""
        return self.members[self.key]


@dataclass(frozen=True, slots=True)
class IfMissing:
    """A value that is set only if the member is missing."""

    value: Any


Patch = Mapping[str, Any]
"""Members to set: scalars, lists of scalars, mappings (merged), ``ListItem``, ``IfMissing`` or
``REMOVE``."""


def settled(patch: Patch, data: Any) -> dict[str, Any]:
    """Return a patch without ``IfMissing``: each of them is a value, or left out.

    Args:
        patch: the patch; there is none of them in a ``ListItem``.
        data: the parsed data that the patch is for.
    """
    result: dict[str, Any] = {}
    members = data if isinstance(data, Mapping) else {}
    for name, value in patch.items():
        if isinstance(value, IfMissing):
            if name not in members:
                result[name] = value.value
        elif isinstance(value, Mapping):
            result[name] = settled(value, members.get(name))
        else:
            result[name] = value
    return result


def apply_patch(data: Any, patch: Patch, place: str = "") -> dict[str, Any]:
    """Return parsed data with a patch applied; the data are not changed.

    Raises:
        ConfigError: if the data have a value of another kind where the patch goes deeper.
    """
    result = dict(expect_mapping(data, place))
    for name, value in patch.items():
        inner = f"{place}.{name}" if place else name
        if value is REMOVE:
            result.pop(name, None)
        elif isinstance(value, ListItem):
            result[name] = _with_item(result.get(name), value, inner)
        elif isinstance(value, Mapping):
            result[name] = apply_patch(result.get(name), value, inner)
        else:
            result[name] = plain(value)
    return result


def _with_item(data: Any, item: ListItem, place: str) -> list[Any]:
    items = list(expect_list(data, place))
    position = item_position(items, item, place)
    if position is None:
        return [*items, apply_patch(None, item.members, place)]
    items[position] = apply_patch(items[position], item.members, f"{place}[{position}]")
    return items


def item_position(items: Sequence[Any], item: ListItem, place: str) -> int | None:
    """Return the index of an item of a list by its member; None if it is missing.

    Raises:
        ConfigError: if there are several.
    """
    found = [
        index
        for index, each in enumerate(items)
        if isinstance(each, Mapping) and each.get(item.key) == item.identity
    ]
    if len(found) > 1:
        raise ConfigError(f"{place} has '{item.identity}' {len(found)} times")
    return found[0] if found else None


def expect_mapping(data: Any, place: str) -> Mapping[str, Any]:
    """Return data that must be a mapping; None, an empty value, is an empty one.

    Raises:
        ConfigError: if it is something else.
    """
    found: Mapping[str, Any] = _expected(data, place, Mapping, "a mapping", {})
    return found


def expect_list(data: Any, place: str) -> Sequence[Any]:
    """Return data that must be a list; None, an empty value, is an empty one.

    Raises:
        ConfigError: if it is something else.
    """
    found: Sequence[Any] = _expected(data, place, list, "a list", [])
    return found


def _expected(data: Any, place: str, kind: type[Any], word: str, empty: Any) -> Any:
    if data is None:
        return empty
    if isinstance(data, kind):
        return data
    raise ConfigError(f"{place or 'the whole file'} is {_kind(data)}, and not {word}")


def _kind(data: Any) -> str:
    match data:
        case bool():
            return "true or false"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case Mapping():
            return "a mapping"
        case list():
            return "a list"
    return "a value of another kind"


def plain(value: Any) -> Any:
    """Return a value of a patch as plain data: tuples become lists, mappings dictionaries."""
    match value:
        case ListItem():
            return [plain(value.members)]
        case Mapping():
            return {name: plain(each) for name, each in value.items() if each is not REMOVE}
        case list() | tuple():
            return [plain(each) for each in value]
    return value
