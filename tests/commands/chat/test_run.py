"""``k2 chat`` beside a run of the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import terminal as terminal_module
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def k2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "k2cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def demo_run(demo_checkpoint: Path) -> Iterator[None]:
    started = k2("launch", str(demo_checkpoint), "--detach", "--context", "4096")
    assert started.returncode == 0, started.stderr
    yield
    assert k2("stop").returncode == 0


@pytest.mark.usefixtures("demo_run")
def test_a_chat_with_the_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(terminal_module, "SECONDS", 120.0)
    long = tmp_path / "long.txt"
    long.write_text("The sky is blue. " * 100)
    monkeypatch.chdir(tmp_path)
    with Terminal("chat", "--temperature", "0", "--max-tokens", "20") as terminal:
        terminal.prompt()
        terminal.enter("What is the capital of France?")
        terminal.expect("Paris")
        terminal.expect("first token after")
        terminal.prompt()
        terminal.expect("localhost · context")
        terminal.enter("Sum up @long.txt")
        terminal.expect("reading the prompt")
        terminal.type("\x03")
        terminal.expect("your message is kept")
        terminal.prompt()
        terminal.enter("Count to fifty.")
        terminal.expect("first token after", 2)
        terminal.prompt()
        terminal.enter("/exit")
        assert terminal.close() == 0
    (saved,) = Path(os.environ["K2_STATE_DIR"], "chats").glob("*.json")
    turns = [turn["content"] for turn in json.loads(saved.read_text())["turns"]]
    assert turns[0] == "What is the capital of France?"
    assert "Count to fifty." in turns
    assert not any("The sky" in turn for turn in turns)
