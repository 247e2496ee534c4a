"""A key that is revoked on the machine that launched a run, whose API is on another one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab import Lab
from lab.runs import LabRun, Talk

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(180)]
PROMISED_SECONDS = 5
K2 = [sys.executable, "-m", "k2cli"]
# Run on k2b, where neither the key file nor the API is: generates until the server ends it.
ASK = """
import json, sys, time, urllib.error, urllib.request
key, tokens = sys.argv[1:]
def post(tokens):
    body = {"prompt": [400] * 20, "max_tokens": int(tokens), "stream": True,
            "k2": {"ignore_stop_tokens": True}}
    headers = {"Content-Type": "application/json", "x-api-key": key}
    return urllib.request.urlopen(urllib.request.Request(
        "http://k2a:8080/v1/completions", json.dumps(body).encode(), headers), timeout=60)
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


def _ask(lab: Lab, key: str, tokens: int) -> Talk:
    return Talk(lab.start("k2b", [sys.executable, "-c", ASK, key, str(tokens)]))


def test_revoking_reaches_an_api_on_another_host(lab: Lab, toy_k2: Path) -> None:
    made = lab.exec("console", [*K2, "keys", "create", "alice"])
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    run = LabRun(
        lab, toy_k2, "ring", "pipeline", detach=True, host="console",
        options=["--host", "0.0.0.0", "--allow-host", "k2a"],
    )  # fmt: skip
    asking = None
    try:
        assert run.talk.wait_end(90) == 0, run.talk.text
        assert "named keys: all: alice" in run.talk.text
        assert "keys and texts travel unencrypted" in run.talk.text
        asking = _ask(lab, key, 4000)
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
