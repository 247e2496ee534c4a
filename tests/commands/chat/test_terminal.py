"""``k2 chat`` on a pseudo-terminal, against a real server with a scripted engine.

What is compared is the screen as text.
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2cli.protocol import PromptProgress, Tokens
from k2cli.server.served_model import ServedModel
from tests.server.requests import K2_FORMAT
from tests.server.scripted import (
    EngineUnavailable,
    Hang,
    LetterTokenizer,
    ScriptedEngine,
    finished,
    serving,
)
from tests.support.terminal import Terminal

SERVED = ServedModel("toy", context_length=2000, output_format=K2_FORMAT)


class ShowsReasoning(LetterTokenizer):
    """Renders reasoning, as the templates of models that think may do."""

    def chat_prompt(self, messages: list[dict[str, Any]], *args: Any, **options: Any) -> str:
        shown = [
            {**turn, "content": f"[{thought}]{turn['content']}"}
            if (thought := turn.get("reasoning_content"))
            else turn
            for turn in messages
        ]
        return super().chat_prompt(shown, *args, **options)


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, SERVED, ShowsReasoning()) as url:
        yield url


@pytest.fixture
def terminal(url: str) -> Iterator[Terminal]:
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        yield terminal


def prompts(engine: ScriptedEngine) -> list[str]:
    return [LetterTokenizer().decode(request.prompt) for request in engine.submitted]


def tokens(text: str) -> Tokens:
    return Tokens("", LetterTokenizer().encode(text))


def ask(terminal: Terminal, engine: ScriptedEngine, question: str, answer: str) -> None:
    """Ask, and wait until the answer is complete."""
    engine.answer(answer)
    done = terminal.text.count("in all")
    terminal.enter(question)
    terminal.expect("in all", done + 1)
    terminal.prompt()


def saved(folder: str = "") -> list[dict[str, Any]]:
    files = Path(os.environ["K2_STATE_DIR"], "chats").glob("*.json")
    return [json.loads(path.read_text()) for path in sorted(files)]


# --- answers ------------------------------------------------------------------------------------

ANSWER = """# Result

A **bold** word, `code` and 中文字符很长的一个句子，因为终端不宽，所以必须换行。
- one item that is longer than a narrow terminal 😀

```python
x = "# no heading" ** 2
```
| Name | Size |
|---|--:|
| a | 10 |
"""

AT_40 = """\
Result

A bold word, code and 中文字符很长的一个
句子，因为终端不宽，所以必须换行。
• one item that is longer than a narrow
  terminal 😀

```python
x = "# no heading" ** 2
```
Name │ Size
─────┼─────
a    │   10"""

AT_WIDE = """\
Result

A bold word, code and 中文字符很长的一个句子，因为终端不宽，所以必须换行。
• one item that is longer than a narrow terminal 😀

```python
x = "# no heading" ** 2
```
Name │ Size
─────┼─────
a    │   10"""


def answer_of(terminal: Terminal) -> str:
    """The lines between the question and the figures."""
    text = terminal.text.replace("\u200b", "")
    return text.split(">>> Show\n")[1].split("\n5 prompt tokens")[0]


@pytest.mark.parametrize(("columns", "size"), [(40, 1), (80, 3), (200, 7)])
def test_an_answer_streams_as_markdown(
    engine: ScriptedEngine, url: str, columns: int, size: int
) -> None:
    with Terminal("chat", "--url", url, columns=columns) as terminal:
        terminal.prompt()
        engine.answer(ANSWER, size=size)
        terminal.enter("Show")
        terminal.expect("in all")
        shown = answer_of(terminal)
    assert shown == (AT_40 if columns == 40 else AT_WIDE)
    assert max(len(line) for line in shown.splitlines()) <= columns


def test_a_change_of_the_size_in_the_middle(engine: ScriptedEngine, url: str) -> None:
    words = [f"word{number}" for number in range(60)]
    with Terminal("chat", "--url", url, columns=80) as terminal:
        terminal.prompt()
        first, second = " ".join(words[:30]), " " + " ".join(words[30:])
        engine.enqueue([tokens(first + " "), 1.5, tokens(second), finished(9)])
        terminal.enter("Show")
        terminal.expect("word28")
        terminal.resize(40)
        terminal.expect("in all")
    # The emulator cuts the lines above off, as xterm does, so this is what was sent to it.
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", terminal.raw).split("word0")[1]
    lines = f"word0{shown}".split("\n5 prompt")[0].splitlines()
    assert " ".join(lines).split() == words
    assert all(len(line) <= 40 for line in lines[3:])
    assert "word28" in lines[2]


def test_waiting_is_visible(engine: ScriptedEngine, terminal: Terminal) -> None:
    progress = [PromptProgress("", done, 40_000, 8192) for done in (8192, 10_240, 12_288)]
    engine.enqueue([0.3, progress[0], 0.3, progress[1], 0.3, progress[2], Hang()])
    terminal.enter("Read this")
    terminal.expect("s left · 12,288 of 40,000 tokens · 8,192 from the cache")
    terminal.type("\x03")
    terminal.expect("stopped")
    assert "reading the prompt" not in terminal.text


def test_reasoning_is_one_line_and_goes_back_apart(
    engine: ScriptedEngine, terminal: Terminal
) -> None:
    engine.enqueue([tokens("<think>They ask for Paris."), 0.6, Hang()])
    terminal.enter("Where?")
    terminal.expect("thinking · ")
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.prompt()
    ask(terminal, engine, "Well?", "<think>They insist.</think>Paris.")
    assert "They" not in terminal.text
    terminal.expect("thought for 0 s, 21 tokens\nParis.")
    terminal.enter("/thinking")
    terminal.expect("They insist.")
    terminal.enter("/thinking show")
    terminal.expect("reasoning: shown")
    terminal.prompt()
    ask(terminal, engine, "Again?", "<think>Third\ntime.</think>Yes.")
    terminal.expect("Third\ntime.\n\nYes.")
    assert prompts(engine)[-1] == (
        "<user>Where?<assistant>[They ask for Paris.]<user>Well?<assistant>[They insist.]Paris."
        "<user>Again?<assistant>"
    )


def test_reasoning_is_switched_off_at_the_model(engine: ScriptedEngine, url: str) -> None:
    with Terminal("chat", "--url", url, "--no-thinking") as terminal:
        terminal.prompt()
        ask(terminal, engine, "Where?", "Paris.")
    assert "<reasoning_effort=none>" in prompts(engine)[0]


HOSTILE = "a\x1b[2Jb\x1b]52;c;ZXZpbA==\x07c\x9b31md\u202ee\x08\x7f\rf\x00"


def test_hostile_escape_sequences_do_nothing(engine: ScriptedEngine, terminal: Terminal) -> None:
    ask(terminal, engine, "Show", f"{HOSTILE}\n```\n{HOSTILE}\n```\n|{HOSTILE}|\n|-|\n|{HOSTILE}|")
    harmless = "a[2Jb]52;c;ZXZpbA==c31mdef"
    assert terminal.text.count(harmless) == 4
    assert terminal.lines[1] == ">>> Show"
    assert "ZXZpbA==\x07" not in terminal.raw


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminals(engine: ScriptedEngine, url: str, environment: dict[str, str]) -> None:
    with Terminal("chat", "--url", url, columns=40, **environment) as terminal:
        terminal.prompt()
        before = len(terminal.raw)
        engine.answer(ANSWER)
        terminal.enter("Show")
        terminal.expect("in all")
        answer = terminal.raw[before:].split("A **bold**")[1].split("prompt tokens")[0]
        terminal.prompt()
        terminal.enter('"""And')
        engine.answer("two")
        terminal.enter('these"""')
        terminal.expect("two")
        terminal.prompt()
        terminal.type("\x03")
        terminal.expect("Ctrl-D or /exit to leave")
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.close() == 0
        if "TERM" in environment:
            assert "\x1b" not in terminal.raw
    assert "\x1b" not in answer
    assert "- one item that is longer than a narrow\r\n  terminal" in answer
    assert prompts(engine)[-1].endswith("<user>And\nthese<assistant>")


# --- input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 200])
def test_a_paste_is_one_message(engine: ScriptedEngine, columns: int) -> None:
    text = "\n".join(f"line {number}: /no {'中文' * 3} command" for number in range(500))
    served = ServedModel("toy", context_length=50_000)
    with (
        serving(engine, served) as url,
        Terminal("chat", "--url", url, columns=columns) as terminal,
    ):
        terminal.prompt()
        terminal.paste(text)
        terminal.expect("line 499")
        engine.answer("Got it.")
        terminal.enter("")
        terminal.expect("Got it.")
        terminal.expect("prompt: ")
    assert prompts(engine) == [f"<user>{text}<assistant>"]


def test_keys_and_history(engine: ScriptedEngine, url: str) -> None:
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        engine.answer("ok")
        terminal.type("巴黎 one\x1b\rtwo\x1b\rthree\x1b[D\x1b[D\x7f\r")
        terminal.expect("in all")
        terminal.prompt()
        ask(terminal, engine, '"""four\rfive"""', "ok")
        terminal.type("half")
        terminal.type("\x03")
        terminal.expect("Ctrl-D or /exit to leave")
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.close() == 0
    history = Path(os.environ["K2_STATE_DIR"], "chat-history")
    entries = history.read_text()
    history.write_text(("\n# old\n+" + "x" * 1000 + "\n") * 2000 + entries)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        engine.answer("ok")
        terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\r")
        terminal.expect("in all")
        assert abs(history.stat().st_size - 2**19) < 2000  # the older part went
    assert prompts(engine) == [
        "<user>巴黎 one\ntwo\nthre<assistant>".replace("thre", "thee"),
        "<user>巴黎 one\ntwo\nthee<assistant>ok<user>four\nfive<assistant>",
        "<user>巴黎 one\ntwo\nthee<assistant>",
    ]


def test_private(engine: ScriptedEngine, url: str) -> None:
    with Terminal("chat", "--url", url, "--private") as terminal:
        terminal.prompt()
        ask(terminal, engine, "secret", "hidden")
        terminal.enter("/exit")
        assert terminal.close() == 0
    state = Path(os.environ["K2_STATE_DIR"])
    assert not [path for path in state.rglob("*") if path.is_file()]
    assert [request.stores_prefix for request in engine.submitted] == [False]


def test_completion(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.csv").write_text("1,2\n")
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        terminal.type("/und")
        terminal.expect("remove the last question and its answer")
        terminal.type("\t")
        terminal.expect(">>> /undo\n")
        terminal.type("\r")
        terminal.expect("there is nothing to undo")
        terminal.prompt()
        terminal.type("/read resu")
        terminal.expect("results.csv")
        terminal.type("\t\r")
        terminal.expect("results.csv (1 line, 4 B), 4 tokens")


def test_files_are_quoted_and_counted(
    engine: ScriptedEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("x = 1\n```\n")
    Path("b.txt").write_text("long " * 500)
    Path("c.bin").write_bytes(b"\0")
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        ask(terminal, engine, "Explain @a.py, please @ann", "ok")
        sent = prompts(engine)[0]
        assert "<user>File a.py (2 lines, 10 B):\n\n````py\nx = 1\n```\n````\n\n" in sent
        assert sent.endswith("Explain @a.py, please @ann<assistant>")
        terminal.expect(f"a.py (2 lines, 10 B), prompt: {len(sent)} tokens of 2,000")
        terminal.enter("/read b.txt")
        terminal.expect("b.txt (1 line, 2.5 kB), 2,500 tokens")
        terminal.prompt()
        terminal.enter("Sum up")
        terminal.expect("and the context holds 2,000;")
        terminal.prompt()
        terminal.enter("/read c.bin")
        terminal.expect("is no text")
    assert len(engine.submitted) == 1


def test_edit(engine: ScriptedEngine, url: str, tmp_path: Path) -> None:
    editor = tmp_path / "editor.py"
    editor.write_text("import sys; open(sys.argv[1], 'a').write(' and\\nmore')\n")
    with Terminal("chat", "--url", url, EDITOR=f"{sys.executable} {editor}") as terminal:
        terminal.prompt()
        engine.answer("ok")
        terminal.enter("/edit This")
        terminal.expect("in all")
        terminal.prompt()
        terminal.enter("/undo")
        terminal.expect("removed: This and")
        terminal.prompt()
        engine.answer("ok")
        terminal.enter("/edit")
        terminal.expect("in all", 2)
    assert prompts(engine)[1] == "<user>This and\nmore and\nmore<assistant>"


# --- commands and conversations -----------------------------------------------------------------


def test_a_conversation(engine: ScriptedEngine, terminal: Terminal) -> None:
    ask(terminal, engine, "Capital of France?", "Paris.")
    terminal.enter("/system Be kind")
    terminal.expect("system prompt: Be kind")
    terminal.prompt()
    ask(terminal, engine, "And of Italy?", "Rome.")
    ask(terminal, engine, "/regen", "Roma.")
    terminal.enter("/nonsense")
    terminal.expect("there is no command '/nonsense'")
    terminal.prompt()
    terminal.expect("toy · context 10 of 2,000 (0%) · 20% from the cache")
    terminal.enter("/set temperature 0.5")
    terminal.expect("temperature: 0.5")
    terminal.prompt()
    terminal.enter("/set temperature 7")
    terminal.expect("'7' is no value of temperature")
    terminal.prompt()
    terminal.enter("/clear")
    terminal.expect("new conversation")
    terminal.prompt()
    ask(terminal, engine, "Who?", "Me.")
    terminal.enter("/exit")
    assert terminal.close() == 0
    italy = "<user>Capital of France?<assistant>Paris.<user>And of Italy?<assistant>"
    assert prompts(engine) == [
        "<user>Capital of France?<assistant>",
        f"<system>Be kind{italy}",
        f"<system>Be kind{italy}",
        "<system>Be kind<user>Who?<assistant>",
    ]
    assert engine.submitted[-1].sampling.temperature == 0.5
    assert [each["title"] for each in saved()] == ["Capital of France?", "Who?"]
    assert [turn["content"] for turn in saved()[0]["turns"]][-1] == "Roma."
    for path in Path(os.environ["K2_STATE_DIR"], "chats").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_conversations_are_found_resumed_and_exported(
    engine: ScriptedEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        ask(terminal, engine, "What is a zebra?", "An **animal**.")
        terminal.enter("/save zebras")
        terminal.expect("saved as 'zebras'")
        terminal.prompt()
        terminal.enter("/clear")
        terminal.prompt()
        ask(terminal, engine, "Other", "Thing")
        terminal.enter("/exit")
        assert terminal.close() == 0
    with Terminal("chat", "--url", url, "--resume", "zeb") as terminal:
        terminal.prompt()
        terminal.expect(">>> What is a zebra?\nAn animal.")
        ask(terminal, engine, "Sure?", "Yes.")
        terminal.enter("/sessions ANIMAL")
        terminal.expect("4 messages: What is a zebra?")
        terminal.prompt()
        terminal.enter("/save ./zebra.md")
        terminal.expect("wrote zebra.md")
        terminal.prompt()
        terminal.enter("/load nowhere")
        terminal.expect("there is no conversation 'nowhere'")
        terminal.prompt()
    assert prompts(engine)[-1] == (
        "<user>What is a zebra?<assistant>An **animal**.<user>Sure?<assistant>"
    )
    assert (
        "## You\n\nWhat is a zebra?\n\n## toy\n\nAn **animal**.\n"
        in (tmp_path / "zebra.md").read_text()
    )
    with Terminal("chat", "--url", url, "--resume", "last") as terminal:
        terminal.expect("zebras: What is a zebra? (4 messages)")


def test_copy_is_exact(engine: ScriptedEngine, terminal: Terminal) -> None:
    answer = "Some **bold** text.\n```sh\n\tls -l\n```\n"
    ask(terminal, engine, "Show", answer)
    for command, text in (("/copy", answer), ("/copy code", "\tls -l\n")):
        terminal.enter(command)
        terminal.expect("by OSC 52")
        terminal.settle()
        assert f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07" in terminal.raw


def test_compaction(engine: ScriptedEngine, terminal: Terminal) -> None:
    engine.enqueue([tokens("Long story."), finished(1700)])
    terminal.enter("Tell me")
    terminal.expect("85% of the context is used (1,705 of 2,000 tokens)")
    terminal.prompt()
    engine.answer("You asked for a story.")
    terminal.enter("/compact")
    terminal.expect("stays saved as")
    terminal.prompt()
    ask(terminal, engine, "Go on", "ok")
    assert prompts(engine)[1].startswith("<user>Tell me<assistant>Long story.<user>Summarize")
    assert "so far:\n\nYou asked for a story.<assistant>" in prompts(engine)[2]
    assert "Long story" not in prompts(engine)[2]
    new, old = sorted(saved(), key=lambda each: each["continues"] is None)
    assert old["turns"][1]["content"] == "Long story."
    assert new["continues"] == old["name"]


# --- stopping and failing -----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 200])
def test_ctrl_c_stops_the_answer_and_not_the_chat(
    engine: ScriptedEngine, url: str, columns: int
) -> None:
    with Terminal("chat", "--url", url, columns=columns) as terminal:
        terminal.prompt()
        engine.enqueue([PromptProgress("", 1, 5), Hang()])
        terminal.enter("Prefill")
        terminal.expect("reading the prompt · ")
        terminal.type("\x03\x03\x03")
        terminal.expect("stopped")
        assert engine.cancellation.wait(5)
        engine.cancellation.clear()
        terminal.expect("your message is kept")
        terminal.prompt()
        engine.enqueue([PromptProgress("", 1, 5), tokens("One, two "), Hang()])
        terminal.enter("/regen")
        terminal.expect("One, two")
        terminal.type("\x03")
        terminal.expect("stopped", 2)
        assert engine.cancellation.wait(5)
        terminal.prompt()
        ask(terminal, engine, "Go on", "three")
        terminal.type("\x03")
        terminal.expect("Ctrl-D or /exit to leave")
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.close() == 0
    assert prompts(engine) == [
        "<user>Prefill<assistant>",
        "<user>Prefill<assistant>",
        "<user>Prefill<assistant>One, two <user>Go on<assistant>",
    ]


def test_typing_during_an_answer_is_not_mixed_with_it(
    engine: ScriptedEngine, terminal: Terminal
) -> None:
    engine.enqueue([tokens("One "), 0.5, tokens("two"), finished(2)])
    engine.answer("three")
    terminal.enter("Count")
    terminal.expect("One")
    terminal.type("Go on\r")
    terminal.expect("three")
    terminal.prompt()
    assert "One two\n" in terminal.text
    engine.enqueue([tokens("Four "), 0.5, tokens("five"), finished(2)])
    engine.answer("six")
    terminal.enter("More")
    terminal.expect("Four")
    terminal.paste("several\nlines")
    terminal.type("\r")
    terminal.expect("six")
    assert prompts(engine)[1] == "<user>Count<assistant>One two<user>Go on<assistant>"
    assert prompts(engine)[3].endswith(
        "<user>More<assistant>Four five<user>several\nlines<assistant>"
    )


def test_a_failing_server_ends_the_answer_and_not_the_chat(
    engine: ScriptedEngine, terminal: Terminal
) -> None:
    engine.enqueue([tokens("Hal "), EngineUnavailable("rank 1 was lost")])
    terminal.enter("Hello")
    terminal.expect("rank 1 was lost")
    terminal.prompt()
    engine.state, engine.cause = "starting", "it restarts"
    terminal.enter("Again")
    terminal.expect("it restarts")
    terminal.expect("your message is kept")
    terminal.prompt()
    engine.state = "ready"
    ask(terminal, engine, "/regen", "Hello")
    assert prompts(engine)[-1] == "<user>Hello<assistant>Hal <user>Again<assistant>"


def test_a_server_that_goes_away(engine: ScriptedEngine) -> None:
    with serving(engine, SERVED) as url:
        terminal = Terminal("chat", "--url", url)
        terminal.prompt()
        engine.enqueue([tokens("Hal "), Hang()])
        terminal.enter("Hello")
        terminal.expect("Hal")
    with terminal:
        terminal.expect("error: ")
        terminal.prompt()
        terminal.enter("Still there?")
        terminal.expect("nothing answers at")
        terminal.expect("your message is kept")
        terminal.prompt()
        assert saved()[0]["unsent"] == "Still there?"
        port = int(url.rpartition(":")[2])
        with serving(engine, SERVED, port=port):
            ask(terminal, engine, "/regen", "I am back")
    assert prompts(engine)[-1] == "<user>Hello<assistant>Hal <user>Still there?<assistant>"


# --- one shot -----------------------------------------------------------------------------------


def test_ctrl_c_ends_a_one_shot(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([tokens("One, two "), Hang()])
    with Terminal("chat", "--url", url, "-p", "Count") as terminal:
        terminal.expect("One, two")
        terminal.type("\x03")
        assert terminal.close() == 130
    assert engine.cancellation.wait(5)


def test_errors_and_hints_are_wrapped_between_words(url: str) -> None:
    with Terminal("chat", "--url", url, columns=34) as terminal:
        terminal.prompt()
        terminal.enter("/nonsense")
        terminal.expect("sent as a")
        terminal.prompt()
        text = terminal.text
    assert "hint: /help lists them; with a\n  space before it, it is sent as a\n  message" in text
