"""``k2 chat`` with tools: real MCP servers, and a rank that writes as Kimi K2-Thinking does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.requests import call_text, calls_text
from tests.support.harness import supervised
from tests.support.scripted_answers import ANSWERS_VARIABLE, Rule, save_rules
from tests.support.terminal import Terminal
from tests.support.thinking_model import thinking_model

pytestmark = pytest.mark.ranks

HOSTILE = Path(__file__).parents[2] / "tools" / "hostile_server.py"
PROGRAMS = Path(sys.executable).parent
PARIS = '{"timezone": "Europe/Paris"}'


def calls(*each: tuple[str, str], thought: str = "A tool knows.") -> str:
    texts = [call_text(number, arguments, name) for number, (name, arguments) in enumerate(each)]
    return f"<think>{thought}</think>{calls_text(*texts)}"


def go(server: str) -> Rule:
    return Rule(calls((f"{server}__go", "{}")), (f"Use {server}",))


RULES = [
    Rule("<think>Again.</think>As I said.", ("AGAIN",)),
    Rule("<think>Done.</think>It is late in Paris, on branch trunk.", ("On branch trunk",)),
    Rule("<think>Done.</think>The time is known.", ('"timezone": "Europe/Paris"', "datetime")),
    Rule("<think>No.</think>Then not.", ("did not allow this call",)),
    Rule("<think>Hm.</think>It was stopped.", ("user stopped this call", "Well?")),
    Rule("<think>Hm.</think>I see the failure.", ("The tool failed",)),
    Rule("<think>Hm.</think>There is no such tool.", ("There is no tool of this name",)),
    Rule("<think>Hm.</think>A long text.", ("cut here",)),
    Rule("<think>Hm.</think>It is done.", ("]0;owned",)),
    Rule(
        calls(("time__get_current_time", PARIS), ("git__git_status", '{"repo_path": "."}')),
        ("both",),
    ),
    Rule(calls(("time__get_current_time", PARIS)), ("What time",)),
    Rule(calls(("unknown__tool", "{}")), ("Use nothing",)),
    Rule(
        calls(("escape__go", json.dumps({"x": "\x1b[2J\u202egnp", "y": "z" * 1100}))), ("Escape",)
    ),
    *map(go, ("hang", "die", "huge")),
    Rule("<think>?</think>Hello."),
]


@pytest.fixture(scope="module")
def url(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tools")
    model = thinking_model(toy_k2, folder / "model")
    save_rules(folder / "answers.json", RULES)
    environment = {ANSWERS_VARIABLE: str(folder / "answers.json")}
    with supervised(
        "local", 1, model=model, context_length=131_072, environment=environment
    ) as run:
        yield run.wait_ready().url.removesuffix("/").removesuffix("/v1")


@pytest.fixture(autouse=True)
def _servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    repository = tmp_path / "work"
    subprocess.run(["git", "init", "-q", "-b", "trunk", str(repository)], check=True)
    monkeypatch.chdir(repository)
    servers: dict[str, Any] = {
        "time": {"command": str(PROGRAMS / "mcp-server-time")},
        "git": {"command": str(PROGRAMS / "mcp-server-git")},
        "broken": {"command": "/no/such/program"},
    }
    for how in ("hang", "die", "huge", "escape"):
        servers[how] = {"command": sys.executable, "args": [str(HOSTILE), how]}
    folder = Path(os.environ["K2_CONFIG_DIR"])
    folder.mkdir(mode=0o700)
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    (folder / "mcp.json").chmod(0o600)


def saved() -> list[dict[str, Any]]:
    (path,) = Path(os.environ["K2_STATE_DIR"], "chats").glob("*.json")
    turns: list[dict[str, Any]] = json.loads(path.read_text())["turns"]
    return turns


def roles() -> list[str]:
    return [turn["role"] for turn in saved()]


def test_tools_of_two_servers(url: str) -> None:
    with Terminal("chat", "--url", url, columns=100, rows=50) as terminal:
        terminal.prompt()
        terminal.enter("/tools")
        terminal.expect("time    off")
        terminal.prompt()
        terminal.enter("/tools on time git")
        terminal.expect("on: time (time__get_current_time, time__convert_time)")
        terminal.expect("on: git (git__git_status,")
        terminal.prompt()
        terminal.enter("Tell me both")
        terminal.expect(f"tool: time__get_current_time {PARIS}")
        terminal.expect("[y] once, [a] always in this conversation, [n] no")
        terminal.enter("a")
        terminal.expect('"timezone": "Europe/Paris"')
        terminal.expect('tool: git__git_status {"repo_path": "."}')
        terminal.expect("call git__git_status?")
        terminal.enter("maybe")
        terminal.expect("answer with y, a, n")
        terminal.enter("y")
        terminal.expect("/result shows it", 2)
        terminal.expect("It is late in Paris, on branch trunk.")
        terminal.prompt()
        terminal.enter("/result")
        terminal.expect("nothing to commit")
        terminal.prompt()
        terminal.enter("/tools")
        terminal.expect("time__get_current_time  allowed:")
        terminal.expect("git__git_status         asks:")
        terminal.prompt()
        terminal.enter("/tools off git")
        terminal.expect("off: git")
        terminal.prompt()
        terminal.enter("/exit")
        assert terminal.close() == 0
    turns = saved()
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["name"] for call in turns[1]["tool_calls"]] == [
        "time__get_current_time",
        "git__git_status",
    ]
    assert [turn["tool_call_id"] for turn in turns[2:4]] == [
        call["id"] for call in turns[1]["tool_calls"]
    ]
    assert turns[1]["reasoning_content"] == "A tool knows."
    with Terminal("chat", "--url", url, "--resume", "last") as terminal:
        terminal.prompt()
        terminal.enter("AGAIN")  # the server takes the calls and results back
        terminal.expect("As I said.")


def test_calls_that_are_not_allowed_or_stopped(url: str) -> None:
    with Terminal(
        "chat", "--url", url, "--tools", "time", "--tools", "hang", columns=100
    ) as terminal:
        terminal.expect("on: hang (hang__go)")
        terminal.prompt()
        # What was typed before the question does not answer it.
        terminal.type("What time is it?\ry\r")
        terminal.expect("call time__get_current_time?")
        terminal.expect("? ")
        terminal.settle(0.5)
        terminal.enter("n")
        terminal.expect("Then not.")
        terminal.expect(">>> y")
        terminal.type("\x03")
        terminal.prompt()
        terminal.enter("/clear")
        terminal.prompt()
        terminal.enter("Use hang")
        terminal.expect("call hang__go?")
        terminal.type("y\r")
        terminal.expect("hang__go runs")
        terminal.type("\x03")
        terminal.expect("stopped")
        terminal.prompt()
        terminal.enter("Well?")
        terminal.expect("It was stopped.")
        terminal.prompt()
        terminal.enter("/clear")
        terminal.prompt()
        terminal.enter("Use nothing")
        terminal.expect("There is no such tool.")
        terminal.prompt()


def test_hostile_servers_do_not_break_the_chat(url: str) -> None:
    options = [word for name in ("die", "huge", "escape", "broken") for word in ("--tools", name)]
    with Terminal("chat", "--url", url, *options, columns=100, rows=60) as terminal:
        terminal.expect("server 'broken': '/no/such/program' cannot be started")
        terminal.prompt()
        terminal.enter("Escape")
        terminal.expect('tool: escape__go {"x": "\\u001b[2J\\u202egnp", "y":')
        terminal.expect("[s] show all arguments")
        terminal.enter("s")
        terminal.expect('zzz"}')
        terminal.expect("call escape__go?", 2)
        terminal.enter("y")
        terminal.expect("| hidden\ufffdend")
        terminal.expect("It is done.")
        terminal.prompt()
        assert "owned" not in terminal.text
        for name, shown, answer in (
            ("die", "! The tool failed: it exited with 3: about to die", "I see the failure."),
            ("huge", "(2 lines, 1.0 MB; /result shows it)", "A long text."),
        ):
            terminal.enter("/clear")
            terminal.prompt()
            terminal.enter(f"Use {name}")
            terminal.expect(f"call {name}__go?")
            terminal.enter("y")
            terminal.expect(shown)
            terminal.expect(answer)
            terminal.prompt()
        assert "\x1b]0;owned" not in terminal.raw


def k2_chat(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "k2cli", "chat", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


def test_one_question_calls_only_what_is_allowed(url: str) -> None:
    once = ("--url", url, "-p", "What time is it?", "--tools", "time")
    refused = k2_chat(*once)
    assert (refused.returncode, refused.stdout) == (0, "Then not.\n")
    assert "not allowed: time__get_current_time" in refused.stderr
    allowed = k2_chat(*once, "--allow-tool", "time__get_current_time", "--json")
    document = json.loads(allowed.stdout)
    assert document["answer"] == "The time is known."
    (call,) = document["tool_calls"]
    assert (call["name"], json.loads(call["arguments"])) == (
        "time__get_current_time",
        json.loads(PARIS),
    )
    assert json.loads(call["result"])["timezone"] == "Europe/Paris"
    for arguments, message in (
        (("--url", url, "-p", "x", "--allow-tool", "a__b"), "--allow-tool is for --tools"),
        (("--url", url, "-p", "x", "--tools", "none"), "has no server 'none'"),
    ):
        wrong = k2_chat(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert message in wrong.stderr
