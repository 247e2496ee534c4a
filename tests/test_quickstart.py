"""The README's first command, from its first line to its last, on two real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2cli.settings import models_directory

ROOT = Path(__file__).resolve().parent.parent
STATE_FOLDERS = "k2-quickstart.*"
ENVIRONMENT = ROOT / ".venv"
LIMIT_SECONDS = 800
"""It takes one minute on an idle machine, of which pip has the half, and many beside other work."""

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.timeout(LIMIT_SECONDS + 100),
    pytest.mark.skipif(
        not Path(sys.executable).is_relative_to(ENVIRONMENT),
        reason="the quickstart would install a second environment: run scripts/test",
    ),
]


@pytest.fixture
def demo_is_there(demo_checkpoint: Path) -> None:
    """Let ``k2 download demo`` find its model, which another test downloads and converts."""
    models_directory().mkdir(parents=True)
    (models_directory() / "demo").symlink_to(demo_checkpoint)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = set(Path("/tmp").glob(STATE_FOLDERS))
    yield
    assert set(Path("/tmp").glob(STATE_FOLDERS)) <= before


@contextmanager
def quickstart() -> Iterator[subprocess.Popen[str]]:
    """Start it, and stop it with its run if the test does not come to its end."""
    with subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "quickstart")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.communicate(timeout=60)


@pytest.mark.usefixtures("demo_is_there")
def test_quickstart_ends_in_an_answer() -> None:
    with quickstart() as process:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    answer = output.split("$ k2 chat ")[1].split("\n== ")[0]
    assert "Paris" in answer
    commands = [line.split()[2] for line in output.splitlines() if line.startswith("$ k2 ")]
    assert commands == [
        "download", "plan-memory", "launch", "chat", "bench", "stop", "ps",
    ]  # fmt: skip


@pytest.mark.usefixtures("demo_is_there")
def test_interrupted_quickstart_stops_what_it_started() -> None:
    """Ctrl-C reaches the whole foreground group of a terminal."""
    with quickstart() as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("$ k2 chat"):
                break
        else:
            pytest.fail("".join(seen))
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(seen) + rest
