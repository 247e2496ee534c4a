"""A command runs with the settings of a run as if it had been started without k2."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2cli.connect.agents import claude, environment
from k2cli.connect.endpoint import Endpoint, Key
from k2cli.connect.execute import environment_with

ENDPOINT = Endpoint("http://127.0.0.1:8080", "kimi", 131_072, key=Key("k2-secret", ("cat", "x")))

RUN = """
import sys, os, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
from k2cli.connect.registry import agent_named
from k2cli.connect.execute import run_agent
from tests.connect.test_execute import ENDPOINT
agent = agent_named(sys.argv[1])
run_agent(agent, agent.settings(ENDPOINT), ENDPOINT, sys.argv[2:], os.environ)
"""
AS_ITSELF, AS_CHILD = "env", "aider"
"""An agent that k2 becomes, and one for which k2 waits because of a temporary file."""
BOTH = pytest.mark.parametrize("agent", [AS_ITSELF, AS_CHILD])


def _command(agent: str, *command: str) -> list[str]:
    return [sys.executable, "-c", RUN, agent, *command]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, in which nothing is left."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@BOTH
@pytest.mark.parametrize("status", [0, 3, 255])
def test_the_exit_status_and_the_streams_are_those_of_the_command(agent: str, status: int) -> None:
    script = f'read line; echo "out $line"; echo "err $OPENAI_API_KEY" >&2; exit {status}'
    done = subprocess.run(
        _command(agent, "sh", "-c", script), input="in\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "out in\n", "err k2-secret\n")


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_command_that_a_signal_ends(agent: str, number: signal.Signals) -> None:
    done = subprocess.run(_command(agent, "sh", "-c", f"kill -{number.value} $$"))
    assert done.returncode == -number


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_command(agent: str, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        _command(agent, "sh", "-c", script),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # no terminal sends the signal to the child as well
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"got {name}\n"
        assert process.wait(20) == 7


@BOTH
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_signal_is_ignored_that_python_ignores(agent: str) -> None:
    """A reader that goes away ends the command, as in a shell."""
    done = subprocess.run(
        _command(agent, "grep", "SigIgn", "/proc/self/status"), capture_output=True, text=True
    )
    ignored = int(done.stdout.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT):
        # A shell starts tests in the background without SIGINT and SIGQUIT.
        kept = number in (signal.SIGINT, signal.SIGQUIT) and _is_ignored(number)
        assert kept or not ignored >> (number - 1) & 1, number


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def _on_terminal(command: list[str]) -> Iterator[tuple[int, int]]:
    """Start a command as a terminal's foreground process; yield its pid and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    try:
        yield pid, terminal
    finally:
        os.close(terminal)


def _read_until(terminal: int, text: str) -> str:
    seen = ""
    while text not in seen:
        seen += os.read(terminal, 1000).decode()
    return seen


@BOTH
def test_ctrl_c_on_a_terminal_reaches_the_command_once(agent: str) -> None:
    script = (
        "n=0; trap 'n=$((n+1)); echo interrupt $n' INT; trap 'echo bye $n; exit 9' TERM; "
        "test -t 0 && test -t 1 && echo ready; while :; do sleep 0.05; done"
    )
    with _on_terminal(_command(agent, "sh", "-c", script)) as (pid, terminal):
        _read_until(terminal, "ready")
        os.write(terminal, b"\x03")
        _read_until(terminal, "interrupt 1")
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        assert "bye 1" in _read_until(terminal, "bye")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@BOTH
def test_a_command_that_stops_itself_stops_k2_until_both_go_on(agent: str) -> None:
    script = "echo ready; kill -STOP $$; echo on; exit 4"
    with _on_terminal(_command(agent, "sh", "-c", script)) as (pid, terminal):
        _read_until(terminal, "ready")
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.killpg(pid, signal.SIGCONT)  # as the shell's fg does
        _read_until(terminal, "on")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4


def test_a_temporary_file_is_private_and_there_while_the_command_runs() -> None:
    script = 'cat "$CLINE_PROVIDER_SETTINGS_PATH"; stat -c %a "${CLINE_PROVIDER_SETTINGS_PATH%/*}"'
    done = subprocess.run(_command("cline", "sh", "-c", script), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"apiKey": "k2-secret"' in done.stdout
    assert '"baseUrl": "http://127.0.0.1:8080/v1"' in done.stdout
    if sys.platform == "linux":
        assert done.stdout.endswith("\n700\n")


def test_only_the_agents_own_program_gets_its_options(tmp_path: Path) -> None:
    for name in ("codex", "other"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\necho "$@"\n')
        program.chmod(0o755)
    own = subprocess.run(
        _command("codex", str(tmp_path / "codex"), "exec"), capture_output=True, text=True
    ).stdout
    assert own.startswith('-c model="kimi" -c model_provider="k2"')
    assert own.endswith(" exec\n")
    assert "k2-secret" not in own
    other = subprocess.run(
        _command("codex", str(tmp_path / "other"), "exec"), capture_output=True, text=True
    )
    assert other.stdout == "exec\n"


@BOTH
def test_a_program_that_is_missing_or_broken(agent: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    for program, text in (("no-such", "is not installed"), (str(broken), "cannot be started")):
        done = subprocess.run(_command(agent, program), capture_output=True, text=True)
        assert done.returncode == 1
        assert text in done.stderr


def test_the_environment_has_no_other_key_and_no_proxy_in_between() -> None:
    inherited = {
        "ANTHROPIC_API_KEY": "sk-own",
        "HTTP_PROXY": "http://proxy:3128",
        "NO_PROXY": "example.org",
        "KEPT": "yes",
    }
    found = environment_with(claude.settings(ENDPOINT), ENDPOINT, inherited)
    assert "ANTHROPIC_API_KEY" not in found
    assert found["ANTHROPIC_AUTH_TOKEN"] == "k2-secret"
    assert found["KEPT"] == "yes"
    assert found["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"
    remote = Endpoint("http://studio-1:8080", "kimi")
    found = environment_with(environment.settings(remote), remote, inherited)
    assert found["NO_PROXY"] == "example.org"
    assert found["OPENAI_API_KEY"] == "none"
