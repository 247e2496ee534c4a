"""A rank's part of the prefix cache on disk: what it removes to make room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k2cli.rank.kv_cache.store import BlockStore


def test_files_behind_a_link_are_never_removed_to_make_room(tmp_path: Path) -> None:
    """A link in the folder of the cache may lead to anything that the user has."""
    other, root = tmp_path / "documents", tmp_path / "prefixes"
    for folder in (other / "letters", root / "old-0" / "scope"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 1000)
    (root / "link-0").symlink_to(other)

    class _Assignment:
        rank = 0

    assignment: Any = _Assignment()
    store = BlockStore(assignment, 1, lambda report: None)
    store._remove_others(root, 0)
    assert (other / "letters" / "file").exists()
    assert not (root / "old-0" / "scope" / "file").exists()
