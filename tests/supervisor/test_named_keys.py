"""Named keys on a real run: they come and go while it serves, and are found nowhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from k2cli.access.key_file import create_key, key_file, revoke_key
from k2cli.access.keys import digest_of
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import KeyLimits
from tests.support.commands import k2
from tests.support.harness import SupervisedRun, supervised, wait_until
from tests.support.scripted_answers import ANSWERS_VARIABLE, Rule, save_rules

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]
RUN_KEY = "k2-canary-of-the-run"
PROMISED_SECONDS = 5
"""The time in which a key that was made or revoked takes effect, by docs/guide/access.md."""


@pytest.fixture
def slow_answers(tmp_path: Path) -> dict[str, str]:
    """The environment of a rank whose answers take a minute."""
    rule = Rule("one two three four five six seven eight nine ten " * 10, pause_seconds=0.5)
    save_rules(tmp_path / "answers.json", [rule])
    return {ANSWERS_VARIABLE: str(tmp_path / "answers.json")}


def _status(url: str, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/models", headers=headers, timeout=10, verify=False).status_code


def _client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def _stream(client: openai.OpenAI) -> Iterator[object]:
    messages = [{"role": "user", "content": "count"}]
    return iter(client.completions.create(model="scripted", prompt=str(messages), stream=True))


def _rest(stream: Iterator[object]) -> tuple[int, openai.APIError | None]:
    """Read a stream to its end; return the number of its events, and the error that ends it."""
    count = 0
    try:
        for _ in stream:
            count += 1
    except openai.APIError as error:
        return count, error
    return count, None


def _text_of_files(*folders: Path) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                yield str(path), path.read_text(errors="replace")


def _text_of_processes(run: SupervisedRun) -> Iterator[tuple[str, str]]:
    for process in [psutil.Process(run.supervisor.pid), *run.processes()]:
        yield f"argv of {process.pid}", " ".join(process.cmdline())
        yield f"environment of {process.pid}", str(process.environ())


def test_keys_come_and_go_on_a_running_run(toy_k2: Path, slow_answers: dict[str, str]) -> None:
    _, alice = create_key("alice", KeyLimits())
    with supervised(
        "local", 1, model=toy_k2, context_length=8192, named_keys="all",
        environment=slow_answers, http={"api_key": RUN_KEY},
    ) as run:  # fmt: skip
        url = run.wait_ready().url
        assert (_status(url, alice), _status(url, RUN_KEY), _status(url, "k2-x")) == (200, 200, 401)
        _, bob = create_key("bob", KeyLimits())
        wait_until(lambda: _status(url, bob) == 200, PROMISED_SECONDS, "the key of bob")

        with _client(url, alice) as client:
            stream = _stream(client)
            next(stream)
            revoke_key("alice")
            received, error = _rest(stream)
            assert "this API key was revoked" in str(error)
            assert received <= 2 * PROMISED_SECONDS  # of the 50 s that the answer takes
        assert (_status(url, alice), _status(url, bob), _status(url, RUN_KEY)) == (401, 200, 200)

        # A file that cannot be used says nothing about any key.
        key_file().chmod(0o644)
        log = run.record.log_file
        wait_until(lambda: "stay as they were" in log.read_text(), PROMISED_SECONDS, "a warning")
        assert _status(url, bob) == 200
        key_file().unlink()
        wait_until(lambda: _status(url, bob) == 401, PROMISED_SECONDS, "no key without a file")

        errors = [
            httpx.post(
                f"{url}/v1/{route}", json={}, headers={"x-api-key": key}, timeout=10, verify=False
            ).text
            for route in ("messages", "chat/completions", "nothing")
            for key in (alice, RUN_KEY)
        ]
        ps, listed = k2("ps", "--json"), k2("keys", "list", "--json")
        found = dict(_text_of_processes(run))
        found |= {
            path: text
            for path, text in _text_of_files(run.record.folder)
            if Path(path).name not in ("api-key", "launch.json")  # of this user alone
        }
        assert "bob" in found[str(log)]
        assert len(found) > 6
    found |= {"ps": ps.stdout + ps.stderr, "keys": listed.stdout, "errors": "".join(errors)}
    for secret in (alice, bob, RUN_KEY):
        for hidden in (secret, digest_of(secret.encode())):
            assert [place for place, text in found.items() if hidden in text] == []
    # Nothing that only a live run needs is left, and no digest of a named key either.
    kept = dict(_text_of_files(Path(os.environ["K2_STATE_DIR"])))
    assert not [path for path, text in kept.items() if digest_of(bob.encode()) in text]


def test_only_chosen_keys_are_accepted_and_a_restart_knows_them(toy_k2: Path) -> None:
    _, alice = create_key("alice", KeyLimits())
    _, bob = create_key("bob", KeyLimits())
    with supervised(
        "local", 1, model=toy_k2, named_keys=["alice"], http={"api_key": RUN_KEY},
        restart=RestartPolicy(mode="on-failure", first_delay_seconds=0.2),
    ) as run:  # fmt: skip
        url = run.wait_ready().url
        assert (_status(url, alice), _status(url, bob)) == (200, 401)
        # The guard itself is killed: a new one is started from a new bootstrap.
        psutil.Process(run.pid_of("guard-0")).kill()
        wait_until(lambda: len(run.record.attempts) == 1, 30, "the next attempt")
        run.wait_ready()
        assert (_status(url, alice), _status(url, bob)) == (200, 401)
        revoke_key("alice")
        wait_until(lambda: _status(url, alice) == 401, PROMISED_SECONDS, "the revocation")
        # The name decides: a new key of that name is accepted.
        _, again = create_key("alice", KeyLimits())
        wait_until(lambda: _status(url, again) == 200, PROMISED_SECONDS, "the new key")
        assert json.loads(k2("keys", "list", "--json").stdout)["keys"][0]["name"] == "bob"


def test_a_launch_says_which_keys_it_accepts_and_refuses_a_bad_file(toy_k2: Path) -> None:
    missing = k2("launch", str(toy_k2), "--keys", "alice")
    assert missing.returncode == 2
    assert "there is no key 'alice'" in missing.stderr
    assert "hint: k2 keys create alice" in missing.stderr
    create_key("alice", KeyLimits())
    key_file().chmod(0o644)
    for options in (["--keys", "all"], ["--host", "0.0.0.0"]):
        refused = k2("launch", str(toy_k2), *options)
        assert refused.returncode == 1
        assert f"chmod 600 {key_file()}" in refused.stderr
