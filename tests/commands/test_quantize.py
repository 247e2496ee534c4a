"""``k2 quantize`` from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from k2cli.models.checkpoint import read_checkpoint
from tests.quantization import originals
from tests.support.commands import k2


def test_quantizes_an_original_and_tells_it_in_json(tmp_path: Path) -> None:
    source = originals.kimi(tmp_path / "source", fp8=True)
    made = tmp_path / "made"
    options = ("--to", str(made), "--recipe", "4bit", "--json")
    dry = k2("quantize", str(source), *options, "--dry-run")
    assert not made.exists()
    done = k2("quantize", str(source), *options)
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["path"] == str(made)
    assert result["stored_bytes"] == read_checkpoint(made).stored_bytes
    assert result["stored_bytes"] == json.loads(dry.stdout)["stored_bytes"]
    assert result["source_bytes"] == read_checkpoint(source).stored_bytes
    assert (result["bits"], result["group_size"], result["schema_version"]) == (4, 64, 1)
    assert result["tensors"] == len(read_checkpoint(made).tensors)
    assert 0 < result["peak_memory_bytes"] < result["source_bytes"]

    again = k2("quantize", str(made), "--to", str(tmp_path / "again"))
    assert again.returncode == 1
    assert "already quantized" in again.stderr


def test_mistakes_are_usage_errors(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    for options in (["--bits", "7", "--to", "x"], ["--mode", "nf4", "--to", "x"], [],
                    ["--recipe", "4bit", "--bits", "4", "--to", "x"]):  # fmt: skip
        done = k2("quantize", str(source), *options)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_interrupt_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    source = originals.llama(
        tmp_path / "source", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6
    )
    # On a busy machine the conversion may be over before it is seen to have begun.
    for attempt in range(5):
        made = tmp_path / f"made{attempt}"
        begun, exit_code = interrupted_while_writing(source, made)
        if begun:
            assert exit_code == 130
            assert not made.exists()
            assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
            return
    raise AssertionError("the conversion was over each time before it could be interrupted")


def interrupted_while_writing(source: Path, made: Path) -> tuple[bool, int]:
    """Return True if the interrupt came while the hidden folder existed, and the exit code."""
    command = [sys.executable, "-m", "k2cli", "quantize", str(source), "--to", str(made)]
    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not hidden(made.parent) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if running.poll() is not None:
            return False, running.returncode
        running.send_signal(signal.SIGSTOP)
        begun = hidden(made.parent)
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGCONT)
        return begun, running.wait(timeout=60)
    finally:
        running.kill()
        running.wait(timeout=10)


def hidden(folder: Path) -> bool:
    return any(path.name.startswith(".") for path in folder.iterdir())
