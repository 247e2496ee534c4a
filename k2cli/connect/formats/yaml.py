"""Editing of YAML with ruamel.yaml, which keeps comments, order and quotes."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from k2cli.connect.formats.patch import (
    REMOVE,
    ConfigError,
    ListItem,
    Patch,
    expect_list,
    item_position,
    plain,
)

_BEGIN = re.compile(r"^---(\s|$)", re.MULTILINE)
_MAX_DEPTH = 60
_MAX_ALIASES = 40
"""More than these could stand for a document of billions of values."""


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain data; None if the text has no value.

    Raises:
        ConfigError: if the text is malformed, has several documents, a name twice, or many aliases.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    parser = YAML(typ="safe", pure=True)
    try:
        _check_tokens(parser.scan(text))
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(_reason(error)) from error


def _check_tokens(tokens: Iterator[Any]) -> None:
    """Check what could take long to read or to compare, before the text is parsed."""
    from ruamel.yaml import tokens as kinds

    begins = (
        kinds.FlowSequenceStartToken,
        kinds.FlowMappingStartToken,
        kinds.BlockSequenceStartToken,
        kinds.BlockMappingStartToken,
    )
    ends = (kinds.FlowSequenceEndToken, kinds.FlowMappingEndToken, kinds.BlockEndToken)
    depth = aliases = 0
    for token in tokens:
        depth += isinstance(token, begins) - isinstance(token, ends)
        aliases += isinstance(token, kinds.AliasToken)
        if depth > _MAX_DEPTH:
            raise ConfigError(f"it is nested more than {_MAX_DEPTH} levels deep")
        if aliases > _MAX_ALIASES:
            raise ConfigError(f"it has more than {_MAX_ALIASES} aliases")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{problem}"


def edit_yaml(text: str, patch: Patch) -> str:
    """Return the text with a patch carried out.

    Raises:
        ConfigError: if ruamel.yaml cannot read the text or make the change.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 1_000_000  # no line is broken
    try:
        sequence, offset = _sequence_indent(text)
        yaml.indent(mapping=_mapping_indent(text), sequence=sequence, offset=offset)
        yaml.explicit_start = _BEGIN.search(text) is not None
        document = yaml.load(text)
        before = "" if document is not None or not text.strip() else text.rstrip("\n") + "\n"
        document = CommentedMap() if document is None else document
        _patch(document, patch, "")
        stream = io.StringIO()
        yaml.dump(document, stream)
        return before + stream.getvalue()
    except (YAMLError, RecursionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"ruamel.yaml cannot change it: {_reason(error)}") from error


def _mapping_indent(text: str) -> int:
    """Return how far members of a mapping stand in from its name."""
    for name, member in _pairs_below_a_name(text):
        more = _indent(member) - _indent(name)
        if member.lstrip(" ")[0] not in "-#" and name.lstrip(" ")[0] != "-" and 1 < more <= 8:
            return more
    return 2


def _sequence_indent(text: str) -> tuple[int, int]:
    """Return how far items of a list, and their dashes, stand in from the name of the list."""
    for name, item in _pairs_below_a_name(text):
        # The name may be the first member of an item itself: "- models:".
        offset = _indent(item) - (len(name) - len(name.lstrip(" -")))
        if item.lstrip(" ").startswith("- ") and 0 <= offset <= 8:
            return offset + 2, offset
    return 4, 2


def _pairs_below_a_name(text: str) -> Iterator[tuple[str, str]]:
    """Yield each line with a name alone, and the line below it."""
    lines = [line for line in text.split("\n") if line.strip()]
    for name, below in itertools.pairwise(lines):
        if name.rstrip().endswith(":") and not name.lstrip(" ").startswith("#"):
            yield name, below


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _patch(data: Any, patch: Patch, place: str) -> None:
    for name, value in patch.items():
        inner = f"{place}.{name}" if place else name
        if value is REMOVE:
            data.pop(name, None)
        elif isinstance(value, ListItem):
            _patch_item(data, name, value, inner)
        elif isinstance(value, Mapping):
            if data.get(name) is None:
                data[name] = _made(value)
            else:
                _patch(data[name], value, inner)
        elif name not in data or data[name] != value:
            data[name] = plain(value)


def _patch_item(data: Any, name: str, item: ListItem, place: str) -> None:
    if data.get(name) is None:
        data[name] = [_made(item.members)]
        return
    position = item_position(expect_list(data[name], place), item, place)
    if position is None:
        data[name].append(_made(item.members))
    else:
        _patch(data[name][position], item.members, f"{place}[{position}]")


def _made(members: Patch) -> Any:
    from ruamel.yaml.comments import CommentedMap

    return CommentedMap(plain(members))
