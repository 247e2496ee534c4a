"""JSON pointers (RFC 6901): the places of parts of a JSON document."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def pointer_part(name: str) -> str:
    """Return a name as a part of a JSON pointer, with the slash before it."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def pointer_of_fragment(reference: str) -> str:
    """Return the JSON pointer that a reference within its document has after the ``#``."""
    return unquote(reference[1:])


def value_at(document: Any, pointer: str) -> Any:
    """Return the part of a document that a JSON pointer names.

    Raises:
        LookupError: if it names none.
    """
    found = document
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found[name]
        elif isinstance(found, list) and _INDEX.fullmatch(name):
            found = found[int(name)]
        else:
            raise LookupError(name)
    return found
