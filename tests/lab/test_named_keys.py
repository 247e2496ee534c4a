"""Keys and TLS of a run that was launched on one machine and has its API on another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab import Lab
from lab.runs import LabRun, Talk
from tests.support.certificates import issue

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(180)]
PROMISED_SECONDS = 5
K2 = [sys.executable, "-m", "k2cli"]
# Run on k2b, where neither the key file nor the API is: generates until the server ends it.
ASK = """
import json, ssl, sys, urllib.error, urllib.request
key, tokens, authority = sys.argv[1:]
trust = ssl.create_default_context(cafile=authority)
def post(tokens):
    body = {"prompt": [400] * 20, "max_tokens": int(tokens), "stream": True,
            "k2": {"ignore_stop_tokens": True}}
    headers = {"Content-Type": "application/json", "x-api-key": key}
    return urllib.request.urlopen(urllib.request.Request(
        "https://k2a:8080/v1/completions", json.dumps(body).encode(), headers),
        timeout=60, context=trust)
try:
    with post(tokens) as answer:
        for number, line in enumerate(answer):
            if number == 0:
                print("answering", flush=True)
            if b"revoked" in line:
                print("ended:", line.decode(), flush=True)
                break
    post(1)
except urllib.error.HTTPError as error:
    print("status", error.code, flush=True)
"""


def _ask(lab: Lab, key: str, tokens: int, authority: Path) -> Talk:
    command = [sys.executable, "-c", ASK, key, str(tokens), str(authority)]
    return Talk(lab.start("k2b", command))


@pytest.mark.soak
def test_revoking_reaches_an_api_on_another_host(lab: Lab, toy_k2: Path, tmp_path: Path) -> None:
    files = issue(tmp_path, "k2a")
    tls = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key)]
    launch = [*K2, "launch", str(toy_k2), "--nodes", "k2a"]
    files.key.chmod(0o644)
    for options, words in (
        (["--tls-cert", "cert.pem", "--tls-key", "key.pem"], "and k2a reads it"),
        (tls, "on k2a: others can use the TLS key"),
    ):
        refused = lab.exec("console", [*launch, *options])
        assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    files.key.chmod(0o600)
    made = lab.exec("console", [*K2, "keys", "create", "alice"])
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    run = LabRun(
        lab, toy_k2, "ring", "pipeline", detach=True, host="console",
        options=["--host", "0.0.0.0", *tls],
    )  # fmt: skip
    asking = None
    try:
        assert run.talk.wait_end(90) == 0, run.talk.text
        assert "named keys: all: alice" in run.talk.text
        assert "tls certificate: for k2a; valid until" in run.talk.text
        assert "warning: keys and texts" not in run.talk.text
        chat = lab.exec("console", [*K2, "chat", "-p", "hello", "--max-tokens", "4"])
        assert (chat.returncode, bool(chat.stdout)) == (0, True), chat.stderr
        asking = _ask(lab, key, 4000, files.authority)
        asking.wait_said("answering", 30)
        revoked = lab.exec("console", [*K2, "keys", "revoke", "alice"])
        assert revoked.returncode == 0, revoked.stderr
        asking.wait_said("ended:", PROMISED_SECONDS)
        asking.wait_said("status 401", PROMISED_SECONDS)
        # No host but the one that launched has the file, and none shows the key.
        assert lab.exec("k2a", ["find", "/run/home", "-name", "keys.json"]).stdout == ""
        for host in ("k2a", "k2b", "console"):
            commands = [found.command for found in lab.processes(host)]
            assert not [line for line in commands if "k2cli" in line and key in line]
        stopped = lab.exec("console", [*K2, "stop", "--all"])
        assert stopped.returncode == 0, stopped.stderr
    finally:
        run.close()
        if asking is not None:
            asking.close()
        lab.exec("console", ["rm", "-rf", "/run/home/.config/k2/access"])
