"""The script that makes a new environment of a node the one in use and removes old ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from k2cli.nodes import install

DAY_SECONDS = 86_400


def switch(root: Path, name: str) -> set[str]:
    """Switch to an environment; return the names of those that are left, without incoming ones."""
    (root / "envs" / name).mkdir(parents=True)
    (root / "incoming").mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-", str(root), name]
    subprocess.run(command, input=install._SWITCH.encode(), check=True)
    assert os.readlink(root / "env") == f"envs/{name}"
    return {path.name for path in (root / "envs").iterdir()}


def age(root: Path, seconds: float, **changes: str) -> None:
    """Let the script believe that it first saw everything that long ago."""
    path = root / "seen.json"
    known = json.loads(path.read_text())
    known["seen"] = {name: since - seconds for name, since in known["seen"].items()}
    path.write_text(json.dumps(known | changes))


def test_old_environments_are_removed_and_running_installations_are_not(tmp_path: Path) -> None:
    assert switch(tmp_path, "one") == {"one"}
    (tmp_path / "envs" / "running").mkdir()
    (tmp_path / "incoming" / "running").mkdir()
    # The wall clock may have been set by a day since the other installation began.
    for path in (tmp_path / "envs" / "running", tmp_path / "incoming" / "running"):
        os.utime(path, (time.time() - DAY_SECONDS,) * 2)
    assert switch(tmp_path, "two") == {"one", "two", "running"}
    age(tmp_path, 7100)
    assert switch(tmp_path, "three") == {"one", "two", "three", "running"}
    age(tmp_path, 200)
    assert switch(tmp_path, "four") == {"three", "four"}
    assert list((tmp_path / "incoming").iterdir()) == []


def test_what_an_earlier_boot_has_left_is_removed(tmp_path: Path) -> None:
    switch(tmp_path, "one")
    switch(tmp_path, "two")
    (tmp_path / "envs" / "running").mkdir()
    age(tmp_path, 0, boot="another")
    assert switch(tmp_path, "three") == {"two", "three", "running"}
    (tmp_path / "seen.json").write_text("[")
    assert switch(tmp_path, "four") == {"two", "three", "four", "running"}
