"""``k2 chat`` against a real server with a scripted engine, on pipes and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from k2cli.protocol import PromptProgress, Tokens
from k2cli.server.served_model import ServedModel
from tests.server.commands import run_k2
from tests.server.requests import K2_FORMAT
from tests.server.scripted import (
    EngineUnavailable,
    Hang,
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
        r"5 prompt tokens · 13 tokens · 6\.0 tokens/s · first token after .* · .* in all\n",
        done.stderr,
    )
    assert prompts(engine) == ["<system>Brief<user>Where?<assistant>"]
    request = engine.submitted[0]
    assert (request.max_tokens, request.sampling.seed, request.sampling.temperature) == (50, 5, 0)


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
    assert "hint: k2 launch demo --detach" in done.stderr
    assert engine.submitted == []


def test_api_key(engine: ScriptedEngine) -> None:
    engine.answer("in")
    with serving(engine, ServedModel("toy", context_length=500, api_key="s3cret")) as url:
        refused = run_k2("chat", "--url", url, "-p", "x")
        assert refused.returncode == 4
        assert "asks for an API key" in refused.stderr
        done = run_k2("chat", "--url", url, "-p", "x", K2_API_KEY="s3cret")
    assert (done.returncode, done.stdout) == (0, "in\n")


# --- reasoning ----------------------------------------------------------------------------------

THINKING = ServedModel("toy", context_length=500, output_format=K2_FORMAT)
THOUGHT = "<think>\nThey ask for Paris.\n</think>Paris."


class ShowsReasoning(LetterTokenizer):
    """Renders reasoning, as the templates of models that think may do."""

    def chat_prompt(self, messages: list[dict[str, Any]], *args: Any, **options: Any) -> str:
        shown = [
            {**turn, "content": f"[{turn.get('reasoning_content', '')}]{turn['content']}"}
            for turn in messages
        ]
        return super().chat_prompt(shown, *args, **options)


@pytest.fixture
def thinking_url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, THINKING, ShowsReasoning()) as url:
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


@pytest.mark.parametrize("dim", [True, False])
def test_reasoning_is_one_dim_block_and_goes_back_apart(
    engine: ScriptedEngine, thinking_url: str, monkeypatch: pytest.MonkeyPatch, dim: bool
) -> None:
    if dim:
        monkeypatch.delenv("NO_COLOR")
    terminal = Terminal("chat", "--url", thinking_url)
    try:
        terminal.expect(">>>")
        engine.answer(THOUGHT, size=1)
        terminal.type("Where?\r")
        if not dim:
            terminal.expect("reasoning:\r\n")
        terminal.expect("They ask for Paris.\r\n\r\n")
        terminal.expect("Paris.\r\n")
        terminal.expect(">>>")
        block = "\x1b[2mThey ask for Paris.\r\n\x1b[0m\r\nParis.\r\n"
        assert (block in terminal.raw) == dim
        engine.enqueue([tokens("<think>Hm, they"), Hang()])
        terminal.type("Sure?\r")
        terminal.expect("Hm, they")
        terminal.type("\x03")
        terminal.expect("stopped")
        engine.answer("Yes.")
        terminal.expect(">>>")
        terminal.type("Well?\r")
        terminal.expect("Yes.")
        terminal.expect(">>>")
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        terminal.end()
    assert prompts(engine)[-1] == (
        "<user>[]Where?<assistant>[\nThey ask for Paris.\n]Paris."
        "<user>[]Sure?<assistant>[Hm, they]<user>[]Well?<assistant>"
    )


# --- on a terminal ------------------------------------------------------------------------------


class Terminal:
    """A k2 process on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._main, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "k2cli", *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            # Makes the terminal the controlling one, so that Ctrl-C becomes a signal.
            preexec_fn=_take_terminal,
        )
        os.close(side)
        self.shown = ""
        self.raw = ""

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def expect(self, text: str, seconds: float = 20) -> None:
        """Read until ``text`` is shown, and forget what came up to it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self._main], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} is not shown, but {self.shown!r}")
            try:
                data = os.read(self._main, 65536)
            except OSError:
                data = b""
            if not data:
                raise AssertionError(f"ended without {text!r}: {self.shown!r}")
            self.raw += data.decode(errors="replace")
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
        self.shown = self.shown.partition(text)[2]

    def close(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(10)

    def end(self) -> None:
        """End what may still run, and give the terminal back."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._main)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(url: str) -> Iterator[Terminal]:
    terminal = Terminal("chat", "--url", url)
    try:
        terminal.expect(">>>")
        yield terminal
    finally:
        terminal.end()


def test_a_conversation(engine: ScriptedEngine, terminal: Terminal) -> None:
    engine.answer("Paris.")
    terminal.type("Capital of France?\r")
    terminal.expect("Paris.")
    terminal.expect("tokens/s")
    engine.answer("Rome \x1b]0;evil\x07巴黎.")
    terminal.type("/system Be kind\r")
    terminal.expect("system prompt: Be kind")
    terminal.type('"""And\rof Italy?"""\r')
    terminal.expect("Rome ]0;evil巴黎.")
    engine.answer("Roma.")
    terminal.type("/regen\r")
    terminal.expect("Roma.")
    terminal.type("/nonsense\r")
    terminal.expect("no command '/nonsense'")
    engine.answer("Fresh.")
    terminal.type("/clear\r")
    terminal.expect("new conversation")
    terminal.type("Who?\r")
    terminal.expect("Fresh.")
    terminal.type("/exit\r")
    assert terminal.close() == 0
    italy = "<user>Capital of France?<assistant>Paris.<user>And\nof Italy?<assistant>"
    assert prompts(engine) == [
        "<user>Capital of France?<assistant>",
        f"<system>Be kind{italy}",
        f"<system>Be kind{italy}",
        "<system>Be kind<user>Who?<assistant>",
    ]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    engine: ScriptedEngine, terminal: Terminal
) -> None:
    engine.enqueue([PromptProgress("", 1, 5), tokens("One, two"), Hang()])
    terminal.type("Count\r")
    terminal.expect("One, two")
    terminal.type("\x03")
    terminal.expect("stopped")
    assert engine.cancellation.wait(5)
    engine.answer("three")
    terminal.expect(">>>")
    terminal.type("Go on\r")
    terminal.expect("three")
    terminal.expect(">>>")
    terminal.type("\x03")
    terminal.expect("Ctrl-D or /exit to leave")
    terminal.expect(">>>")
    terminal.type("\x04")
    assert terminal.close() == 0
    assert prompts(engine)[1] == "<user>Count<assistant>One, two<user>Go on<assistant>"


def test_ctrl_c_ends_a_one_shot(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([tokens("One, two"), Hang()])
    terminal = Terminal("chat", "--url", url, "-p", "Count")
    try:
        terminal.expect("One, two")
        terminal.type("\x03")
        assert terminal.close() == 130
    finally:
        terminal.end()
    assert engine.cancellation.wait(5)


def test_a_failing_server_ends_the_answer_and_not_the_chat(
    engine: ScriptedEngine, terminal: Terminal
) -> None:
    engine.enqueue([tokens("Hal"), EngineUnavailable("rank 1 was lost")])
    terminal.type("Hello\r")
    terminal.expect("Hal")
    terminal.expect("rank 1 was lost")
    engine.state, engine.cause = "starting", "it restarts"
    terminal.expect(">>>")
    terminal.type("Again\r")
    terminal.expect("it restarts")
    engine.state = "ready"
    engine.enqueue([tokens("Hello"), finished(5)])
    terminal.expect(">>>")
    terminal.type("Again\r")
    terminal.expect("Hello")
    terminal.type("/bye\r")
    assert terminal.close() == 0
    last = "<user>Hello<assistant>Hal<user>Again<assistant>"
    assert prompts(engine)[-1] == last
