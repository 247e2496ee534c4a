"""The model of ``k2 doctor --deep`` has the same bytes on every machine, and is made once."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.link_check_model import make_link_check_model
from k2cli.models.text.present import check_text_files


def test_the_model_is_the_same_everywhere_and_made_once(tmp_path: Path) -> None:
    folder = make_link_check_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    # Nodes make it each for itself: with another content FOLDER_NAME must change too.
    assert hashlib.sha256(weights.read_bytes()).hexdigest()[:16] == "ed735c099f028757"
    assert read_checkpoint(folder).config["hidden_size"] == 7168
    check_text_files(folder)
    before = weights.stat().st_mtime_ns
    assert make_link_check_model(folder) == folder
    assert weights.stat().st_mtime_ns == before


def test_what_a_killed_process_has_left_of_it_is_removed(tmp_path: Path) -> None:
    old, new, used = (tmp_path / f".model.k2-{name * 8}" for name in "abc")
    for left in (old, new, used):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"part")
    for left in (old, used):
        os.utime(left, (1, 1))
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    make_link_check_model(tmp_path / "model")
    os.close(lock)
    assert not old.exists()
    assert new.exists()  # it may have no lock yet
    assert used.exists()
