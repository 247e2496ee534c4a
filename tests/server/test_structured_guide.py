"""Run every example of docs/guide/structured-output.md against a real run of the toy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import k2

pytestmark = [pytest.mark.ranks, pytest.mark.shared_state]
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "structured-output.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
(SCHEMA,) = [text for kind, text in BLOCKS if kind == "json"]
EXAMPLES = [(kind, text) for kind, text in BLOCKS if kind != "json"]
SECONDS = 120


@pytest.fixture(scope="module")
def address(toy_k2: Path) -> Iterator[str]:
    """Host and port of the run, which has the name that the guide uses."""
    # Without a parser of reasoning: the toy, which writes anything, would not end its reasoning.
    run = k2(
        "launch", str(toy_k2), "--alias", "kimi", "--context", "4096", "--dtype", "float32",
        "--reasoning-parser", "none", "--detach",
    )  # fmt: skip
    try:
        yield run["url"].removeprefix("http://")
    finally:
        k2("stop", run["run_id"])


def run_example(kind: str, text: str, address: str, folder: Path) -> str:
    """Run a block of the guide as a reader would; return what it prints."""
    (folder / "city.json").write_text(SCHEMA)
    text = text.replace("127.0.0.1:8080", address)
    k2_itself = f"{sys.executable} -m k2cli"
    text = re.sub(r"^k2 ", f"{k2_itself} ", text)
    if shutil.which("jq") is None:
        text = text.replace(" | jq .", "")
    if kind == "python":
        command = [sys.executable, "-c", text]
    else:
        command = ["bash", "-o", "pipefail", "-c", text]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, env=os.environ,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (text, done.stdout, done.stderr)
    return done.stdout


def content(printed: str) -> Any:
    """Return the answer's text in a printed chat completion."""
    choice = json.loads(printed)["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def test_every_example_runs(address: str, tmp_path: Path) -> None:
    printed = [run_example(kind, text, address, tmp_path) for kind, text in EXAMPLES]
    chat, curl, parsed, responses, messages, call, regex, grammar = printed
    assert set(json.loads(chat)) == {"city", "country", "people"}
    assert set(json.loads(content(curl))) == {"city", "people"}
    assert parsed.startswith("name=")
    assert "stars=" in responses
    assert "'answer':" in messages
    assert call.startswith("forecast {'city': ")
    assert re.fullmatch(r"[12]\d{3}-[01]\d-[0-3]\d", content(regex))
    assert re.fullmatch(r"(yes|no), because [a-z ]{5,60}", content(grammar))
