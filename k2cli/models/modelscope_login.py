"""The token of a login that ModelScope's client has stored, read without running its pickle.

The client keeps its cookies as a pickle, and loading a pickle can run any program that it names.
Here the instructions of the pickle are listed, which runs none of them, and only the texts and
numbers beside the names of a cookie's fields are taken.
"""

from __future__ import annotations

import itertools
import pickletools
import time
from collections.abc import Iterator
from pathlib import Path

from k2cli.files import read_regular

_LIMIT_BYTES = 2**20
_COOKIE = "m_session_id"
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_IGNORED = frozenset({"MARK", "FRAME", "PROTO"})


def stored_token(cookies: Path) -> str | None:
    """Return the token in the client's file of cookies; None if there is none that is valid."""
    try:
        values = list(_values(read_regular(cookies, _LIMIT_BYTES, follow_links=True)))
    except (OSError, ValueError, IndexError, KeyError):
        return None
    cookie: dict[object, object] = {}
    for field, value in itertools.pairwise(values):
        if field == "version":  # the first field of each cookie
            cookie = {}
        if field in ("name", "value", "expires") and field not in cookie:
            cookie[field] = value
        token, expires = cookie.get("value"), cookie.get("expires")
        if cookie.get("name") == _COOKIE and isinstance(token, str) and "expires" in cookie:
            lasts = not isinstance(expires, int) or expires > time.time()
            return token if lasts and token.isascii() and token.isprintable() else None
    return None


def _values(data: bytes) -> Iterator[object]:
    """Yield the texts and numbers of a pickle in their order, and None for anything else.

    Raises:
        ValueError: if it is no pickle.
        IndexError, KeyError: if it refers to what it does not have.
    """
    memo: dict[int, object] = {}
    last: object = None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in _PUTS:
            memo[int(argument or 0)] = last
        elif opcode.name not in _IGNORED:
            if opcode.name in _GETS:
                last = memo[int(argument or 0)]
            else:
                last = argument if isinstance(argument, str | int) else None
            yield last
