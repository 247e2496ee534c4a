"""Editing of JSON, with or without comments and trailing commas, by replacing parts of its text.

No library on PyPI changes JSON and keeps its comments well, so this has a parser that knows where
each value stands. Everything outside the members that a patch names stays byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from k2cli.connect.formats.patch import (
    REMOVE,
    ConfigError,
    ListItem,
    Patch,
    expect_list,
    expect_mapping,
    item_position,
    plain,
)

_MAX_DEPTH = 60
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_WORD = re.compile(r"[-+.\w]+")
_LINE_COMMENT = re.compile(r"//[^\r\n]*")
_REST_OF_LINE = re.compile(r"(?:[ \t]|/\*[^\n]*?\*/)*(?://[^\r\n]*)?(?=\r?\n|\Z)")


@dataclass(slots=True)
class Node:
    """A value and where it stands in the text.

    ``comma`` is the position of the comma after the value, None without one. ``name_start`` is that
    of the name of a member.
    """

    kind: Literal["object", "array", "scalar"]
    start: int
    end: int = 0
    value: Any = None
    name: str = ""
    name_start: int = 0
    comma: int | None = None
    children: list[Node] = field(default_factory=list)

    def member(self, name: str) -> Node | None:
        """Return the member of an object, None if it has none of that name."""
        return next((each for each in self.children if each.name == name), None)


class _Parser:
    def __init__(self, text: str, *, comments: bool) -> None:
        self.text = text
        self.position = 0
        self.comments = comments

    def document(self) -> Node | None:
        self._skip()
        if self.position == len(self.text):
            return None
        root = self._value(0)
        self._skip()
        if self.position < len(self.text):
            raise self.error("something follows the end of the value")
        return root

    def error(self, what: str) -> ConfigError:
        before = self.text[: self.position]
        line, column = before.count("\n") + 1, self.position - before.rfind("\n")
        return ConfigError(f"line {line}, column {column}: {what}")

    def _skip(self) -> None:
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            begins = self.text[self.position : self.position + 2]
            if begins not in ("//", "/*"):
                return
            if not self.comments:
                raise self.error("a comment, which this file must not have")
            if begins == "//":
                self.position = _LINE_COMMENT.match(self.text, self.position).end()  # type: ignore[union-attr]
            else:
                end = self.text.find("*/", self.position + 2)
                if end < 0:
                    raise self.error("a comment that does not end")
                self.position = end + 2

    def _value(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise self.error(f"it is nested more than {_MAX_DEPTH} levels deep")
        match self.text[self.position : self.position + 1]:
            case "{":
                return self._container("object", "}", depth)
            case "[":
                return self._container("array", "]", depth)
            case '"':
                start = self.position
                return Node("scalar", start, value=self._string(), end=self.position)
        return self._word()

    def _string(self) -> str:
        found = _STRING.match(self.text, self.position)
        if found is None:
            raise self.error("a text that does not end, or has a control character")
        try:
            value: str = json.loads(found[0])
        except ValueError:
            raise self.error("a text with a wrong escape") from None
        self.position = found.end()
        return value

    def _word(self) -> Node:
        found = _WORD.match(self.text, self.position)
        if found is None:
            raise self.error("a value is missing")
        if found[0] in ("NaN", "Infinity", "-Infinity"):
            raise self.error(f"'{found[0]}' is no JSON")
        try:
            value = json.loads(found[0])
        except ValueError:
            raise self.error(f"'{found[0][:40]}' is no value of JSON") from None
        self.position = found.end()
        return Node("scalar", found.start(), found.end(), value)

    def _container(self, kind: Literal["object", "array"], closing: str, depth: int) -> Node:
        node = Node(kind, self.position)
        names: set[str] = set()
        self.position += 1
        self._skip()
        while self.text[self.position : self.position + 1] != closing:
            node.children.append(self._child(node, names, depth))
            self._skip()
            following = self.text[self.position : self.position + 1]
            if following == ",":
                node.children[-1].comma = self.position
                self.position += 1
                self._skip()
                at_end = self.text[self.position : self.position + 1] == closing
                if at_end and not self.comments:
                    raise self.error("a comma after the last value")
            elif following != closing:
                raise self.error(f"a comma or '{closing}' is missing")
        self.position += 1
        node.end = self.position
        return node

    def _child(self, parent: Node, names: set[str], depth: int) -> Node:
        if parent.kind == "array":
            return self._value(depth + 1)
        name_start = self.position
        if self.text[name_start : name_start + 1] != '"':
            raise self.error("the name of a member is missing")
        name = self._string()
        if name in names:
            self.position = name_start
            raise self.error(f"'{name}' is there twice")
        names.add(name)
        self._skip()
        if self.text[self.position : self.position + 1] != ":":
            raise self.error(f"the colon after '{name}' is missing")
        self.position += 1
        self._skip()
        child = self._value(depth + 1)
        child.name, child.name_start = name, name_start
        return child


def parse_json(text: str, *, comments: bool = True) -> Any:
    """Parse JSON; None if there is nothing but space and comments.

    Args:
        comments: True if comments and trailing commas are allowed.

    Raises:
        ConfigError: if the text is malformed, nested too deeply, or names a member twice.
    """
    root = _Parser(text, comments=comments).document()
    return None if root is None else data_of(root)


def data_of(node: Node) -> Any:
    """Return the data of a node."""
    if node.kind == "object":
        return {child.name: data_of(child) for child in node.children}
    if node.kind == "array":
        return [data_of(child) for child in node.children]
    return node.value


def edit_json(text: str, patch: Patch, *, comments: bool = True) -> str:
    """Return the text with a patch carried out.

    Raises:
        ConfigError: as of ``parse_json``, or if a value of the text is of another kind.
    """
    # Removals may touch the comma of a neighbour, so they are made one after the other.
    while True:
        root = _Parser(text, comments=comments).document()
        if root is None:
            return _begin(text, patch)
        editor = _Editor(text, removing=True)
        editor.patch_object(root, patch, "")
        if not editor.changes:
            break
        text = editor.result()
    editor = _Editor(text, removing=False)
    editor.patch_object(root, patch, "")
    return editor.result()


def _begin(text: str, patch: Patch) -> str:
    """Return a text that had no value, with its comments before the value."""
    style, comments = _Style(text), text.rstrip()
    before = comments + style.newline if comments else ""
    return before + style.rendered(plain(patch), "") + style.newline


class _Style:
    """The indentation and the line ends of a text."""

    def __init__(self, text: str) -> None:
        self.newline = "\r\n" if "\r\n" in text else "\n"
        found = re.search(r"[\[{][ \t]*(?://[^\n]*)?\r?\n([ \t]+)\S", text)
        self.unit = found[1] if found and len(found[1]) <= 8 else "  "

    def rendered(self, value: Any, indent: str) -> str:
        """Return a value over several lines, the first of which is not indented."""
        text = json.dumps(value, indent=self.unit, ensure_ascii=False)
        return text.replace("\n", self.newline + indent)


class _Editor:
    """Collects replacements in a text, and carries them out together."""

    def __init__(self, text: str, *, removing: bool) -> None:
        self.text = text
        self.removing = removing
        self.style = _Style(text)
        self.changes: list[tuple[int, int, str]] = []

    def result(self) -> str:
        text = self.text
        for start, end, new in sorted(self.changes, reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def patch_object(self, node: Node, patch: Patch, place: str) -> None:
        if node.kind != "object":
            expect_mapping(data_of(node), place)  # null and other kinds
        new: dict[str, Any] = {}
        for name, value in patch.items():
            child = node.member(name)
            inner = f"{place}.{name}" if place else name
            if value is REMOVE:
                if child is not None and self.removing:
                    self._remove(node, child)
            elif child is not None:
                self._change(child, value, inner)
            else:
                new[name] = plain(value)
        if new and not self.removing:
            self._insert(node, [f"{json.dumps(name)}: " for name in new], list(new.values()))

    def _change(self, child: Node, value: Any, place: str) -> None:
        if isinstance(value, ListItem):
            if child.kind == "array":
                self._change_item(child, value, place)
                return
            expect_list(data_of(child), place)
        elif isinstance(value, Mapping):
            if child.kind == "object":
                self.patch_object(child, value, place)
                return
            expect_mapping(data_of(child), place)
        new = plain(value)
        if self.removing or (data_of(child) == new and type(data_of(child)) is type(new)):
            return
        self.changes.append(
            (child.start, child.end, self.style.rendered(new, self._indent(child.start)))
        )

    def _change_item(self, array: Node, item: ListItem, place: str) -> None:
        position = item_position([data_of(each) for each in array.children], item, place)
        if position is not None:
            self.patch_object(array.children[position], item.members, f"{place}[{position}]")
        elif not self.removing:
            self._insert(array, [""], [plain(item.members)])

    def _indent(self, position: int) -> str:
        """Return the space at the beginning of the line that a position is in."""
        line = self.text[self.text.rfind("\n", 0, position) + 1 : position]
        return line[: len(line) - len(line.lstrip(" \t"))]

    def _begins_line(self, position: int) -> bool:
        return not self.text[self.text.rfind("\n", 0, position) + 1 : position].strip(" \t")

    def _insert(self, node: Node, names: list[str], values: list[Any]) -> None:
        """Add members or items at the end of an object or array."""
        if not node.children:
            self._fill(node, names, values)
            return
        last = node.children[-1]
        first_letter = last.name_start if node.kind == "object" else last.start
        if not self._begins_line(first_letter):
            texts = [
                name + json.dumps(value, ensure_ascii=False)
                for name, value in zip(names, values, strict=True)
            ]
            at = last.end if last.comma is None else last.comma + 1
            before = ", " if last.comma is None else " "
            self.changes.append((at, at, before + ", ".join(texts)))
            return
        indent, newline = self._indent(first_letter), self.style.newline
        texts = [
            newline + indent + name + self.style.rendered(value, indent)
            for name, value in zip(names, values, strict=True)
        ]
        after = last.end if last.comma is None else last.comma + 1
        rest = _REST_OF_LINE.match(self.text, after)
        at = rest.end() if rest and rest.end() < node.end else after
        if last.comma is not None:
            self.changes.append((at, at, ",".join(texts) + ","))
        elif at == last.end:
            self.changes.append((at, at, ",".join(["", *texts])))
        else:
            self.changes += [(last.end, last.end, ","), (at, at, ",".join(texts))]

    def _fill(self, node: Node, names: list[str], values: list[Any]) -> None:
        """Put members or items into an object or array that has none, after its comments."""
        outer, newline = self._indent(node.start), self.style.newline
        indent = outer + self.style.unit
        texts = [
            newline + indent + name + self.style.rendered(value, indent)
            for name, value in zip(names, values, strict=True)
        ]
        kept = self.text[node.start + 1 : node.end - 1].rstrip()
        start = node.start + 1 + len(kept)
        self.changes.append((start, node.end - 1, ",".join(texts) + newline + outer))

    def _remove(self, parent: Node, child: Node) -> None:
        if self.changes:
            return  # its turn comes
        index = parent.children.index(child)
        start, end = child.name_start, child.end
        if child.comma is not None:
            # Comments between the value and its comma go with it; there hardly ever are any.
            end = child.comma + 1
        elif index:
            comma = parent.children[index - 1].comma
            assert comma is not None
            self.changes.append((comma, comma + 1, ""))
        if self._begins_line(start):
            line_start = self.text.rfind("\n", 0, start) + 1
            rest = re.compile(r"[ \t]*\r?\n").match(self.text, end)
            if rest is not None:
                start, end = line_start, rest.end()
        else:
            end = re.compile(r"[ \t]*").match(self.text, end).end()  # type: ignore[union-attr]
        self.changes.append((start, end, ""))
