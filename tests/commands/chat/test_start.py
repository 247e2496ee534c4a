"""``k2 chat MODEL`` where nothing runs: it starts a run, which ends with its last chat."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from k2cli.agent.run_processes import processes_of_run
from k2cli.commands.chat.run import ChatRuns
from k2cli.errors import DoesNotFitError, K2Error
from k2cli.launch.request import LaunchRequest
from k2cli.runs.record import RunRecord, list_runs
from tests.support import terminal as terminal_module
from tests.support.terminal import Terminal
from tests.support.thinking_model import thinking_model

SECONDS = 60.0


@pytest.fixture
def model(toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(terminal_module, "SECONDS", SECONDS)
    return str(thinking_model(toy_k2, tmp_path / "toy"))


def wait(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def only_run() -> RunRecord:
    (run,) = list_runs()
    return run


def k2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "k2cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )


@pytest.mark.ranks
def test_a_run_ends_with_its_last_chat_however_that_ends(model: str) -> None:
    with Terminal("chat", model) as first:
        first.expect("it ends with its last chat")
        first.prompt()
        with Terminal("chat") as second:
            second.prompt()
            shown = k2("ps").stdout
            assert "started by k2 chat; it ends with its last chat" in shown
            first.enter("/exit")
            assert first.close() == 0
            time.sleep(2.5)
            assert only_run().state == "ready"
            os.kill(second.process.pid, signal.SIGKILL)
            wait(lambda: not only_run().live, "the end of the run")
    run = only_run()
    assert (run.state, run.cause) == ("stopped", "its last chat has left")
    assert not processes_of_run(run.run_id)


@pytest.mark.ranks
def test_ctrl_c_during_the_start_leaves_nothing(model: str) -> None:
    with Terminal("chat", model) as terminal:
        terminal.expect("Ctrl-C stops it")
        terminal.type("\x03")
        assert terminal.close() == 130
    run = only_run()
    assert run.state == "stopped"
    assert not processes_of_run(run.run_id)
    assert sorted(path.name for path in run.folder.iterdir() if "api" in path.name) == []


def test_a_state_folder_that_cannot_be_used(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("K2_STATE_DIR", str(state))
    state.touch()
    with pytest.raises(K2Error, match=r"state/chat-start.lock' cannot be written"):
        ChatRuns().find(model, None, None)
    state.unlink()
    state.mkdir()
    lock = state / "chat-start.lock"
    os.mkfifo(lock)
    with pytest.raises(K2Error, match="is not a regular file") as error:
        ChatRuns().find(model, None, None)
    assert error.value.hint == f"move it away: mv {lock} {lock}.old"
    lock.unlink()

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(K2Error, match="cannot be locked: No locks available") as error:
        ChatRuns().find(model, None, None)
    assert "K2_STATE_DIR" in (error.value.hint or "")


def test_only_the_demo_is_downloaded_unasked() -> None:
    done = k2("chat", "k2-thinking", "-p", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "model 'k2-thinking' is not on this machine" in done.stderr
    assert "hint: k2 download k2-thinking, then k2 chat k2-thinking" in done.stderr
    assert not list_runs()


def test_wrong_names_are_found_before_a_model_is_started(model: str) -> None:
    for option, value, message in (
        ("--tools", "time", "which names the MCP servers"),
        ("--resume", "nothing", "there is no conversation 'nothing'"),
    ):
        done = k2("chat", model, "-p", "x", option, value)
        assert (done.returncode, done.stdout) == (2 if option == "--tools" else 1, "")
        assert message in done.stderr
        assert not list_runs()


def test_a_model_that_does_not_fit_here_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: LaunchRequest) -> None:
        assert request.ends_with_chats
        assert request.nodes is None  # this machine alone
        assert request.prefix_disk_bytes == 3 * 10**9  # as for every launch
        raise DoesNotFitError("big does not fit: localhost needs 2 TB", "--force")

    monkeypatch.setenv("K2_PREFIX_CACHE_DISK", "3GB")
    monkeypatch.setattr("k2cli.models.reference.local_checkpoint", Path)
    monkeypatch.setattr("k2cli.commands.run_start.prepare", refuse)
    with pytest.raises(DoesNotFitError, match="big does not fit") as error:
        ChatRuns().find("big", None, None)
    assert error.value.hint is not None
    assert "k2 launch big --nodes NODE,NODE --detach" in error.value.hint
    assert "--force" not in error.value.hint
    assert not list_runs()
