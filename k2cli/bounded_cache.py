"""A cache of the values that were used last, bounded by their bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class BoundedCache(Generic[_Value]):
    """A cache of the values that were used last.

    Args:
        max_bytes: the most that the values may have in all, as their users count them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[bytes, tuple[_Value, int]] = OrderedDict()

    def get(self, key: bytes) -> _Value | None:
        """Return a value that is cached, or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: bytes, value: _Value, size: int) -> None:
        """Add a value, and drop those that were not used for longest."""
        if key in self._values or size > self._max_bytes:
            return
        self._values[key] = (value, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._bytes -= self._values.popitem(last=False)[1][1]
