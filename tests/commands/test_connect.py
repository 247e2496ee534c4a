"""``k2 connect`` as a user calls it, for a live run with a key."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from k2cli.cli import run_command_line
from k2cli.errors import UsageError
from k2cli.runs.record import RankRecord, RunRecord, save_record
from k2cli.server.served_model import ServedModel
from tests.commands.test_bench import CountingEngine
from tests.server.scripted import serving
from tests.support.commands import K2, k2

KEY = "k2-s3cret-of-the-run"
SERVED = ServedModel("toy", aliases=("kimi",), context_length=65_536, api_key=KEY)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "XDG_CONFIG_HOME", "SHELL", "K2_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def url() -> Iterator[str]:
    with serving(CountingEngine(), SERVED) as address:
        _save("toy-1a2b", address)
        yield address


def _save(run_id: str, url: str, key: str | None = KEY) -> RunRecord:
    record = RunRecord(
        run_id=run_id,
        model="models/toy",
        model_name="toy",
        state="ready",
        backend="local",
        strategy="pipeline",
        context_length=65_536,
        ranks=(RankRecord(0, "localhost"),),
        created=time.time(),
        url=url,
        pid=os.getpid(),
        pid_create_time=psutil.Process().create_time(),
    )
    record.folder.mkdir(parents=True, exist_ok=True)
    save_record(record)
    if key is not None:
        (record.folder / "api-key").write_text(f"{key}\n")
    return record


def test_the_settings_are_printed_and_the_key_is_not(url: str) -> None:
    done = k2("connect", "claude")
    assert done.returncode == 0, done.stderr
    assert f"export ANTHROPIC_BASE_URL={url}\n" in done.stdout
    assert "k2 connect claude --write" in done.stderr
    shown = k2("connect", "codex")
    assert f'base_url = "{url}/v1"' in shown.stdout
    assert KEY not in done.stdout + done.stderr + shown.stdout + shown.stderr
    document = json.loads(k2("connect", "opencode", "--model", "kimi", "--json").stdout)
    assert document["run_id"] == "toy-1a2b"
    assert document["model"] == "kimi"
    shown = k2("connect", "opencode", "--model", "kimi")
    assert "k2 connect opencode --model kimi --write\n" in shown.stderr
    assert document["context_tokens"] == 65_536
    assert document["key_command"][-3:] == ["connect", "env", "--show-key"]
    assert KEY not in json.dumps(document)
    done = k2("connect", "env", "--show-key")
    assert (done.stdout, done.stderr) == (f"{KEY}\n", "")


def test_the_printed_lines_give_the_key_to_a_shell(url: str) -> None:
    script = f'eval "$({" ".join(K2)} connect env)"; echo "$OPENAI_API_KEY $OPENAI_BASE_URL"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{KEY} {url}/v1\n", done.stderr


def test_a_command_gets_the_environment(url: str) -> None:
    script = 'echo "$ANTHROPIC_BASE_URL $ANTHROPIC_AUTH_TOKEN"; exit 7'
    done = k2("connect", "claude", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{url} {KEY}\n", "")


def test_a_file_is_written_after_a_yes(url: str, home: Path) -> None:
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text('{\n  "theme": "dark"\n}\n')
    done = k2("connect", "claude", "--write")
    assert done.returncode == 2
    assert "without a terminal to ask on, nothing is changed" in done.stderr
    assert "hint: k2 connect claude --write --yes\n" in done.stderr
    assert "+++ " in done.stdout
    for answer, status in ((b"n\n", 1), (b"y\n", 0)):
        before = path.read_text()
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        asked = subprocess.run(
            [*K2, "connect", "claude", "--write"], stdin=theirs, capture_output=True, timeout=60
        )
        os.close(ours), os.close(theirs)
        assert asked.returncode == status, asked.stderr
        assert (path.read_text() == before) == (status == 1)
    settings = json.loads(path.read_text())
    assert settings["theme"] == "dark"
    assert settings["env"]["ANTHROPIC_BASE_URL"] == url
    assert KEY not in path.read_text()
    (copy,) = path.parent.glob("settings.json.k2-*")
    assert f"mv {copy} {path}" in asked.stderr.decode()
    helper = subprocess.run(["sh", "-c", settings["apiKeyHelper"]], capture_output=True, text=True)
    assert helper.stdout == f"{KEY}\n"
    done = k2("connect", "claude", "--write", "--yes")
    assert done.returncode == 0
    assert "says all this already" in done.stderr
    assert len(list(path.parent.iterdir())) == 2


def test_json_tells_what_was_written(url: str, home: Path) -> None:
    done = k2("connect", "cline", "--write", "--yes", "--json")
    (written,) = json.loads(done.stdout)["written"]
    assert written["copy"] is None
    assert Path(written["path"]).read_text().count(KEY) == 1
    assert "(hidden)" in written["difference"]
    assert KEY not in done.stdout + done.stderr


def test_one_file_that_cannot_be_changed_leaves_all_as_they_are(url: str, home: Path) -> None:
    (home / ".aider.model.metadata.json").write_text("{")
    done = k2("connect", "aider", "--write", "--yes")
    assert done.returncode == 1
    assert "is left as it is: line 1" in done.stderr
    assert [each.name for each in home.iterdir()] == [".aider.model.metadata.json"]


def test_the_choice_of_the_run(url: str) -> None:
    other = replace(_save("other-3c4d", url), model="models/other", model_name="other")
    save_record(other)
    done = k2("connect", "env")
    assert done.returncode == 2
    assert "2 runs are live: " in done.stderr
    assert "hint: k2 connect env --run " in done.stderr
    done = k2("connect", "env", "--run", "toy")
    assert done.returncode == 0, done.stderr
    assert 'connect env --show-key --run toy)"' in done.stdout
    assert k2("connect", "env", "--run", "none").returncode == 1
    assert k2("connect", "env", "--run", "toy", "--model", "no").returncode == 1


def test_a_server_of_another_machine_and_its_key(url: str, tmp_path: Path) -> None:
    done = k2("connect", "claude", "--url", url, K2_API_KEY=KEY)
    assert 'ANTHROPIC_AUTH_TOKEN="$(printenv K2_API_KEY)"' in done.stdout
    key = tmp_path / "alice.key"
    key.write_text(f"{KEY}\n")
    done = k2("connect", "claude", "--url", url, "--key-file", str(key))
    assert f'ANTHROPIC_AUTH_TOKEN="$(cat {key})"' in done.stdout
    done = k2("connect", "claude", "--url", url)
    assert done.returncode == 4
    key.write_text("two words\n")
    assert "does not hold a key alone" in k2("connect", "env", "--key-file", str(key)).stderr


def test_a_run_without_a_key_gets_none_of_the_environment(tmp_path: Path) -> None:
    with serving(CountingEngine(), replace(SERVED, api_key=None)) as address:
        _save("free-1a2b", address, key=None)
        done = k2(
            "connect", "claude", "--", "sh", "-c", "echo $ANTHROPIC_AUTH_TOKEN", K2_API_KEY=KEY
        )
        assert done.stdout == "none\n"
        assert "ANTHROPIC_AUTH_TOKEN=none\n" in k2("connect", "claude", K2_API_KEY=KEY).stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["cursor"], "no agent that k2 knows"),
        (["env", "--write"], "no configuration file"),
        (["claude", "--yes"], "--yes is for --write"),
        (["claude", "--write", "--", "claude"], "exclude each other"),
        (["claude", "--json", "--show-key"], "exclude each other"),
        (["claude", "--shell", "csh"], "'csh' is not one of sh, fish, powershell"),
        (["claude", "--run", "x", "--url", "y"], "exclude each other"),
        (["claude", "--url", "http://me:s3cret@x:1/v1"], "a user name or a password"),
    ],
)
def test_wrong_command_lines(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)) as caught:
        run_command_line(["connect", *arguments])
    assert caught.value.hint
    assert "s3cret" not in f"{caught.value.message} {caught.value.hint}"
