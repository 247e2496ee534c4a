"""The cache of what was used last."""

from __future__ import annotations

from k2cli.bounded_cache import BoundedCache


def test_a_cache_keeps_what_was_used_last() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    for key in (b"a", b"b"):
        cache.put(key, "x", 5)
    assert cache.get(b"a") == "x"
    cache.put(b"c", "x", 5)
    cache.put(b"d", "x", 11)
    assert [cache.get(key) for key in (b"a", b"b", b"c", b"d")] == ["x", None, "x", None]
