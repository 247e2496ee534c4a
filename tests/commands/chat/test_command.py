"""``k2 chat`` with one question and on pipes, against a real server with a scripted engine."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.chat.session import ChatSession
from k2cli.client.client import ApiClient, ModelInfo
from k2cli.commands.chat import command as chat_command
from k2cli.commands.chat.run import ChatRuns
from k2cli.commands.target import Target
from k2cli.protocol import Tokens
from k2cli.server.served_model import ServedModel
from tests.server.commands import run_k2
from tests.server.requests import K2_FORMAT, encode
from tests.server.scripted import (
    EngineUnavailable,
    LetterTokenizer,
    ScriptedEngine,
    finished,
    serving,
)

SERVED = ServedModel("toy", context_length=500)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, SERVED) as url:
        yield url


def prompts(engine: ScriptedEngine) -> list[str]:
    return [LetterTokenizer().decode(request.prompt) for request in engine.submitted]


def tokens(text: str) -> Tokens:
    return Tokens("", LetterTokenizer().encode(text))


# --- one shot -----------------------------------------------------------------------------------


def test_one_shot_gives_the_answer_alone_on_stdout(engine: ScriptedEngine, url: str) -> None:
    engine.answer("**Paris**. 😀")
    options = ["--url", url, "-p", "Where?", "--system", "Brief", "--temperature", "0"]
    done = run_k2("chat", *options, "--seed", "5", "--max-tokens", "50")
    assert (done.returncode, done.stdout) == (0, "**Paris**. 😀\n")
    assert re.fullmatch(
        r"5 prompt tokens \(1 cached\) · 13 tokens · 6\.0 tokens/s"
        r" · first token after .* · .* in all\n",
        done.stderr,
    )
    assert prompts(engine) == ["<system>Brief<user>Where?<assistant>"]
    request = engine.submitted[0]
    assert (request.max_tokens, request.sampling.seed, request.sampling.temperature) == (50, 5, 0)


def test_tools_for_a_model_without_a_form_of_calls_are_warned_of(
    engine: ScriptedEngine, url: str
) -> None:
    pytest.importorskip("mcp")
    folder = Path(os.environ["K2_CONFIG_DIR"])
    folder.mkdir(mode=0o700)
    server = {"command": str(Path(sys.executable).parent / "mcp-server-time")}
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"time": server}}))
    (folder / "mcp.json").chmod(0o600)
    engine.answer("ok")
    done = run_k2("chat", "--url", url, "-p", "What time is it?", "--tools", "time")
    assert "warning: toy cannot call tools" in done.stderr
    engine.answer("ok")
    assert "warning" not in run_k2("chat", "--url", url, "-p", "What time is it?").stderr


def test_piped_input_comes_before_the_prompt(engine: ScriptedEngine, url: str) -> None:
    for _ in range(2):
        engine.answer("ok\n")
    done = run_k2("chat", "toy", "--url", f"{url}/v1/", "-p", "Sum up", stdin="A text.\n")
    assert done.stdout == "ok\n"
    assert run_k2("chat", "--url", url, stdin="Only this").returncode == 0
    assert prompts(engine) == [
        "<user>A text.\n\nSum up<assistant>",
        "<user>Only this<assistant>",
    ]


def test_json(engine: ScriptedEngine, url: str) -> None:
    engine.answer("Paris", reason="length")
    done = run_k2("chat", "--url", url, "-p", "Where?", "--json")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert document["schema_version"] == 1
    assert (document["model"], document["answer"]) == ("toy", "Paris")
    assert document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 5
    assert document["timings"]["prefill_seconds"] == 0.5
    assert document["timings"]["tokens_per_second"] == 2.0


def test_a_run_lost_in_the_middle_keeps_the_partial_answer(
    engine: ScriptedEngine, url: str
) -> None:
    for _ in range(2):
        engine.enqueue([tokens("Par"), EngineUnavailable("rank 1 on mac2 was lost")])
    done = run_k2("chat", "--url", url, "-p", "Where?")
    assert (done.returncode, done.stdout) == (5, "Par\n")
    assert "the answer broke off: rank 1 on mac2 was lost" in done.stderr
    done = run_k2("chat", "--url", url, "-p", "Where?", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["answer"], document["finish_reason"]) == (5, "Par", None)
    assert "mac2" in document["error"]


def test_failures_say_whose_they_are(engine: ScriptedEngine, url: str) -> None:
    done = run_k2("chat", "--url", "http://127.0.0.1:9", "-p", "x")
    assert done.returncode == 5
    assert "nothing answers at http://127.0.0.1:9/v1" in done.stderr
    assert "hint: k2 ps" in done.stderr
    done = run_k2("chat", "other", "--url", url, "-p", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not serve 'other'; it serves toy" in done.stderr
    engine.state, engine.cause = "failed", "rank 0 ran out of memory"
    done = run_k2("chat", "--url", url, "-p", "x")
    assert done.returncode == 5
    assert "rank 0 ran out of memory" in done.stderr
    engine.state = "ready"
    done = run_k2("chat", "--url", url, "-p", "x" * 600)
    assert done.returncode == 1
    assert "the context of 500" in done.stderr
    for arguments in (["--url", "ftp://x", "-p", "x"], ["--url", url], ["-p", "x", "--seed", "a"]):
        assert run_k2("chat", *arguments).returncode == 2
    done = run_k2("chat", "-p", "x")
    assert done.returncode == 1
    assert "hint: k2 chat demo" in done.stderr
    assert engine.submitted == []


def test_api_key(engine: ScriptedEngine) -> None:
    engine.answer("in")
    with serving(engine, ServedModel("toy", context_length=500, api_key="s3cret")) as url:
        refused = run_k2("chat", "--url", url, "-p", "x")
        assert refused.returncode == 4
        assert "asks for an API key" in refused.stderr
        done = run_k2("chat", "--url", url, "-p", "x", K2_API_KEY="s3cret")
    assert (done.returncode, done.stdout) == (0, "in\n")


def test_files_and_a_pipe_make_one_question(
    engine: ScriptedEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.md").write_text("Be kind.\n")
    Path("big.txt").write_text("x" * 500)
    engine.answer("ok")
    done = run_k2(
        "chat", "--url", url, "-p", "Review", "--file", "rules.md", "--no-thinking", stdin="+ a\n"
    )
    assert (done.returncode, done.stdout) == (0, "ok\n")
    quoted = "File rules.md (1 line, 9 B):\n\n```md\nBe kind.\n```"
    (prompt,) = prompts(engine)
    assert prompt.startswith(f"<user>{quoted}\n\n+ a\n\nReview<")
    assert "<reasoning_effort=none>" in prompt
    assert f"prompt: {len(prompt)} tokens of 500" in done.stderr
    done = run_k2("chat", "--url", url, "-p", "Review", "--file", "big.txt")
    assert done.returncode == 1
    assert "tokens, and the context holds 500; it was not sent" in done.stderr
    done = run_k2("chat", "--url", url, "-p", "Review", "--file", "nosuch")
    assert (done.returncode, len(engine.submitted)) == (2, 1)
    assert "'nosuch' cannot be read" in done.stderr


def test_defaults_and_a_saved_conversation(engine: ScriptedEngine, url: str) -> None:
    config = Path(os.environ["K2_CONFIG_DIR"])
    config.mkdir(parents=True, exist_ok=True)
    (config / "chat.toml").write_text("temperature = 0.5\nseed = 7\nsystem = 'Brief.'\n")
    chats = Path(os.environ["K2_STATE_DIR"]) / "chats"
    chats.mkdir(parents=True, mode=0o700)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    saved = {"name": "a", "title": "Hi", "model": "toy", "created": 1, "updated": 1, "turns": turns}
    (chats / "a.json").write_text(json.dumps(saved))
    engine.answer("ok")
    done = run_k2("chat", "--url", url, "-p", "And?", "--resume", "last", "--seed", "8")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert prompts(engine) == ["<system>Brief.<user>Hi<assistant>Ho<user>And?<assistant>"]
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.seed) == (0.5, 8)
    kept = json.loads((chats / "a.json").read_text())
    assert [turn["content"] for turn in kept["turns"]] == ["Hi", "Ho", "And?", "ok"]
    # A question alone is not kept: scripts would fill the list.
    engine.answer("ok")
    assert run_k2("chat", "--url", url, "-p", "x").returncode == 0
    assert [path.name for path in chats.iterdir()] == ["a.json"]
    (config / "chat.toml").write_text("temperature = 9\n")
    done = run_k2("chat", "--url", url, "-p", "x")
    assert done.returncode == 2
    assert "chat.toml': '9' is no value of temperature" in done.stderr


def test_a_chat_finds_the_run_that_replaces_its_own(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ApiClient("http://127.0.0.1:9") as gone:
        session = ChatSession(gone, ModelInfo("toy", 500, is_k2=True))
        runs = ChatRuns()
        chat_command._reconnect(session, runs)  # there is no run at all
        assert session.api is gone
        target = Target(url, None, "toy")
        monkeypatch.setattr(runs, "again", lambda model: target)
        chat_command._reconnect(session, runs)
        assert session.api.base == f"{url}/v1"
        engine.answer("ok")
        assert [type(event).__name__ for event in session.ask("Hi")][-1] == "Ended"
        session.api.close()


# --- reasoning ----------------------------------------------------------------------------------

THINKING = ServedModel("toy", context_length=500, output_format=K2_FORMAT)


def test_the_figures_say_what_was_guessed(engine: ScriptedEngine, url: str) -> None:
    """The only sign of speculation that a user of the terminal sees."""
    engine.enqueue([Tokens("", encode("Paris")), finished(5, draft_tokens=7, accepted_tokens=3)])
    done = run_k2("chat", "--url", url, "-p", "Where?")
    assert "5 tokens (3 guessed)" in done.stderr


THOUGHT = "<think>\nThey ask for Paris.\n</think>Paris."


@pytest.fixture
def thinking_url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, THINKING) as url:
        yield url


def test_a_pipe_gets_the_answer_without_its_reasoning(
    engine: ScriptedEngine, thinking_url: str
) -> None:
    engine.answer(THOUGHT)
    done = run_k2("chat", "--url", thinking_url, "-p", "Where?")
    assert done.stdout == "Paris.\n"
    assert "They ask" not in done.stderr
    assert "42 tokens (21 of reasoning)" in done.stderr
    engine.answer(THOUGHT)
    done = run_k2("chat", "--url", thinking_url, "-p", "Where?", "--json")
    document = json.loads(done.stdout)
    assert document["answer"] == "Paris."
    assert document["reasoning"] == "\nThey ask for Paris.\n"
    assert document["usage"]["completion_tokens_details"]["reasoning_tokens"] == 21
