"""The command line as a user's shell sees it: exit codes, streams, help, no colour in pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from k2cli import __version__
from k2cli.cli import _COMMANDS, _with_resume_name, build_app, run_command_line
from k2cli.commands.usage_errors import EXAMPLES
from k2cli.errors import K2Error, UsageError
from k2cli.settings import state_directory
from tests.support.commands import k2

HELP_TRANSCRIPT = Path(__file__).parent / "data" / "help.txt"
COMMANDS = [name for name, _ in _COMMANDS]
ESCAPE = "\x1b"


def test_help_at_width_80_is_the_golden_transcript() -> None:
    """After a wanted change: ``COLUMNS=80 NO_COLOR=1 k2 --help > tests/data/help.txt``."""
    done = k2("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == HELP_TRANSCRIPT.read_text()
    assert k2("-h").stdout == done.stdout


def test_version() -> None:
    done = k2("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"k2 {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    """Test ``-h``; the transcript shows that ``--help`` prints the same."""
    done = k2(command, "-h")
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"k2 {command}" in done.stdout.split("\n", 1)[1], "no example"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ESCAPE not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan-memroy", "demo"], "plan-memory"),
        (["nonsense"], "nonsense"),
        (["plan-memory"], "MODEL"),
        (["launch"], "MODEL"),
        (["launch", "demo", "--no-such-flag"], "--no-such-flag"),
        (["launch", "demo", "--port", "many"], "--port"),
        (["launch", "demo", "--parallel", "diagonal"], "diagonal"),
        (["plan-memory", "no-such-model", "--hardware", "2x m3-ultra-512"], "no-such-model"),
        (["plan-memory", "./no/such/folder", "--hardware", "2x m3-ultra-512"], "./no/such/folder"),
        (["plan-memory", "k2-thinking", "--hardware", "2x quantum-9000"], "quantum-9000"),
        (["launch", "no-such-model", "--nodes", "localhost"], "no-such-model"),
        (["download", "no-such-model"], "no-such-model"),
    ],
)
def test_usage_errors_name_the_wrong_value_and_exit_2(arguments: list[str], named: str) -> None:
    done = k2(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (state_directory() / "crash.log").exists()


def test_no_command_shows_the_help() -> None:
    done = k2()
    assert done.returncode == 2
    assert "plan-memory" in done.stdout + done.stderr


def test_a_model_that_is_not_here_is_a_failure_with_the_command_that_fetches_it() -> None:
    done = k2("launch", "demo", "--nodes", "localhost")
    assert done.returncode == 1
    assert "k2 download demo" in done.stderr


def test_lists_are_empty_on_a_fresh_machine() -> None:
    done = k2("ps", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["runs"] == []
    assert k2("ps").returncode == 0


@pytest.mark.parametrize(
    ("command", "start"),
    [
        (["stop"], "k2 launch"),
        (["logs"], "k2 launch"),
        (["chat", "-p", "Hello"], "k2 chat demo"),
        (["bench"], "k2 launch"),
        (["connect", "claude"], "k2 launch"),
    ],
)
def test_without_a_run_the_error_says_how_to_start_one(command: list[str], start: str) -> None:
    done = k2(*command)
    assert done.returncode in {1, 2, 5}
    assert "error: " in done.stderr
    assert f"hint: {start}" in done.stderr


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "", "TERM": "xterm-256color"}])
def test_pipes_get_no_escape_codes(environment: dict[str, str]) -> None:
    for arguments in (["--help"], ["nonsense"], ["ps"], ["launch", "no-such-model"]):
        done = k2(*arguments, **environment)
        assert ESCAPE not in done.stdout + done.stderr


def test_an_internal_error_is_one_line_and_a_crash_report() -> None:
    """The program replaces the application by one that fails, and is otherwise k2."""
    program = (
        "import k2cli.cli as cli\n"
        "def build_app(only): raise RuntimeError('boom')\n"
        "cli.build_app = build_app\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 70
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "boom" in done.stderr.splitlines()[0]
    assert "boom" in (state_directory() / "crash.log").read_text()


def test_a_mac_that_gives_no_gpu_is_told_so_and_is_no_bug() -> None:
    program = (
        "import k2cli.cli as cli\n"
        "def build_app(only): raise RuntimeError('[metal::load_device] No Metal device '\n"
        "    'available. This typically occurs in headless, sandboxed, or virtualized macOS '\n"
        "    'sessions where the GPU is not accessible.')\n"
        "cli.build_app = build_app\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "macOS gives this session no GPU" in done.stderr
    assert "internal error" not in done.stderr
    assert not (state_directory() / "crash.log").exists()


def test_a_reader_that_goes_away_is_no_crash() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "k2cli", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert "Traceback" not in errors
    assert "internal error" not in errors


def test_an_interrupt_that_a_compiled_module_swallowed_is_still_an_interrupt() -> None:
    """mlx's initialisation turns Ctrl-C into an ImportError with the interrupt as its cause."""
    program = """
from k2cli import cli
def interrupted(**_):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise ImportError("while initializing the extension") from interrupt
cli.build_app = lambda only=None: interrupted
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")


_NEEDED = {
    ("download",): ("MODEL",), ("plan-memory",): ("MODEL",), ("quantize",): ("SOURCE",),
    ("launch",): ("MODEL",), ("keys", "create"): ("NAME",),
    ("doctor",): ("--deep",),
}  # fmt: skip
"""The arguments and options without which a command with numbers cannot run."""


def _is_number(option: Any) -> bool:
    """True if typer reads the value as a number, and not a function of k2."""
    return str(option.type.name).partition(" ")[0] in ("int", "float")


def _number_options() -> list[tuple[tuple[str, ...], Any]]:
    """Every option of every command that takes a number, from the application itself."""
    found: list[tuple[tuple[str, ...], Any]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(build_app()))]
    while waiting:
        path, command = waiting.pop()
        waiting += [
            ((*path, name), each) for name, each in getattr(command, "commands", {}).items()
        ]
        for option in command.params:
            if _is_number(option):
                found.append((path, option))
    return found


@pytest.mark.parametrize(
    ("path", "option"), _number_options(), ids=lambda each: getattr(each, "name", None)
)
def test_a_wrong_number_is_named_with_one_that_is_right(path: tuple[str, ...], option: Any) -> None:
    name = max(option.opts, key=len)
    least, most = getattr(option.type, "min", None), getattr(option.type, "max", None)
    below = [f"{least - 1:g}"] if least is not None else []
    above = [f"{most + 1:g}"] if most is not None else []
    beyond = ["9" * 5000] if option.type.name.startswith("int") else []
    for value in ("many", "", *beyond, *below, *above):
        with pytest.raises(UsageError) as caught:
            run_command_line([*path, f"{name}={value}"])
        assert name in caught.value.message
        assert value[:20] in caught.value.message
        assert len(caught.value.message) < 160
        needed = _NEEDED.get(path, ())
        assert caught.value.hint == " ".join(["k2", *path, *needed, name, EXAMPLES[name]])
    example = float(EXAMPLES[name])
    assert (least or 0) <= example <= (most or example)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("plan-memory demo", "--context"),
        ("plan-memory demo", "--prompt-tokens"),
        ("launch demo", "--answer-tokens"),
        ("chat", "--max-tokens"),
        ("doctor --deep", "--most-tokens"),
    ],
)
def test_every_number_of_tokens_is_read_in_the_same_way(command: str, option: str) -> None:
    """A user who writes ``--context 128k`` writes ``--prompt-tokens 60k`` too."""
    application: Any = typer.main.get_command(build_app())
    parsed = application.commands[command.split()[0]]
    (parameter,) = [each for each in parsed.params if option in each.opts]
    model = ["x"] if "demo" in command else []
    context = parsed.make_context("k2", [*model, option, "4k"])
    assert context.params[parameter.name] == 4096
    with pytest.raises(UsageError) as caught:
        run_command_line([*command.split(), option, "4kb"])
    assert caught.value.message == f"{option} '4kb' is not a number of tokens"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(option)


def test_no_number_is_no_number() -> None:
    for line in ("chat --temperature nan -p hello", "launch demo --wait nan"):
        with pytest.raises(UsageError) as caught:
            run_command_line(line.split())
        assert "nan" in caught.value.message


def test_a_wrong_choice_and_a_wrong_name_are_named() -> None:
    done = k2("launch", "demo", "--parallel", "foo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--parallel 'foo' is not one of 'auto', 'single'" in done.stderr
    assert done.stderr.endswith("hint: k2 launch demo --parallel auto\n")
    with pytest.raises(UsageError) as caught:  # the default, which is not the first
        run_command_line(["launch", "demo", "--speculation", "on"])
    assert caught.value.hint == "k2 launch demo --speculation auto"
    for words, hint in (
        (["launch", "demo", "--prefix-cache-disk"], "--prefix-cache-disk SIZE"),
        (["cache", "clear", "--model"], "--model NAME"),
        (["launch", "demo", "--parallel"], "k2 launch demo --parallel auto"),
        (["doctor", "--most-tokens"], "k2 doctor --most-tokens 8192 --deep"),
    ):
        with pytest.raises(UsageError, match="requires an argument") as caught:
            run_command_line(words)
        assert caught.value.hint == hint
    done = k2("plan-memory", "demo", "--nope")
    assert done.stderr.startswith("error: no such option: --nope")
    assert done.stderr.endswith("hint: k2 plan-memory --help\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "-p", "caf\udce9"], "'caf?' is not UTF-8"),
        (["plan-memory", "mod\udce9le", "--hardware", "this"], "'mod?le' is not UTF-8"),
        (["plan-memory", "x", "--save=\udcff/plan.json"], "'--save=?/plan.json' is not UTF-8"),
        (["launch", "x", "--api-key", "secret\udce9"], "--api-key is not UTF-8"),
        (["launch", "x", "--api-key=secret\udce9"], "--api-key is not UTF-8"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_a_usage_error(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_command_line(arguments)
    assert caught.value.message == said


def test_a_file_whose_name_is_not_utf_8_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"mod\xe9le")
    folder.mkdir()
    with pytest.raises(K2Error, match=r"config\.json"):
        run_command_line(["plan-memory", str(folder), "--hardware", "this"])


def test_resume_without_a_name_is_the_newest_conversation() -> None:
    for line, expected in (
        ("chat --resume", "chat --resume last"),
        ("chat --resume -p x", "chat --resume last -p x"),
        ("chat --private --resume", "chat --private --resume last"),
        ("chat -p x --resume", "chat -p x --resume last"),
        ("chat --resume name", "chat --resume name"),
        ("chat --resume=name", "chat --resume=name"),
        ("chat -p --resume", "chat -p --resume"),
        ("chat -- --resume", "chat -- --resume"),
        ("ps --resume", "ps --resume"),
    ):
        assert list(_with_resume_name(line.split())) == expected.split()
