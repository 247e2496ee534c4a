"""The model of ``k2 doctor --deep`` has the same bytes on every machine, and is made once."""

from __future__ import annotations

import hashlib
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
