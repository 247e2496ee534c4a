"""``k2 launch`` from one host over two, by SSH names and a real sshd: the answer of one rank alone.

The demo model runs as a pipeline; it has nine attention heads, so that the toy of Kimi K2 stands in
for it where a layer is cut in two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lab import Lab
from lab.runs import LabRun

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(180)]
QUESTION = "What is the capital of France?"
# Run on k2a: a greedy answer of the model that is served there.
ASK = """
import json, sys, urllib.request
body = {"messages": [{"role": "user", "content": sys.argv[1]}], "temperature": 0,
        "max_tokens": 16}
request = urllib.request.Request(
    "http://127.0.0.1:8080/v1/chat/completions", json.dumps(body).encode(),
    {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(request, timeout=60))
print(json.dumps(answer["choices"][0]["message"]["content"]))
"""
STATUS = """
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:8080/v1/status", timeout=20).read().decode())
"""
_single: dict[Path, str] = {}
# mlx-lm's too, see tests/rank/test_tokens.py; to launch it once more for that takes ten seconds.
DEMO_ANSWER = "The capital of France is Paris."


def _answer(lab: Lab) -> str:
    done = lab.exec("k2a", [sys.executable, "-c", ASK, QUESTION], timeout_seconds=90)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout))


def _launch(lab: Lab, model: Path, nodes: str, backend: str, strategy: str) -> tuple[str, str]:
    """Launch, ask, and stop; returns the answer and what the launcher said."""
    checked = "," in nodes and strategy == "tensor"  # the toy, which is fast
    options = ["--link-check", "auto", "--context", "400"] if checked else []
    run = LabRun(lab, model, backend, strategy, detach=True, nodes=nodes, options=options)
    try:
        assert run.talk.wait_end(90) == 0, run.talk.text
        answer = _answer(lab)
        stopped = lab.exec("k2a", [sys.executable, "-m", "k2cli", "stop", "--all"])
        assert stopped.returncode == 0, stopped.stderr
        assert run.wait_gone(10), [lab.processes(host.name) for host in lab.hosts]
    finally:
        run.close()
    return answer, run.talk.text


@pytest.mark.parametrize(
    ("name", "backend", "strategy"),
    [
        ("demo_checkpoint", "ring", "pipeline"),
        pytest.param("demo_checkpoint", "mpi5", "pipeline", marks=pytest.mark.soak),
        ("toy_k2", "mpi4", "tensor"),
        pytest.param("toy_k2", "ring", "tensor", marks=pytest.mark.soak),
        pytest.param("toy_k2", "mpi5", "tensor", marks=pytest.mark.soak),
        pytest.param("toy_k2", "mpi4", "pipeline", marks=pytest.mark.soak),
    ],
)
def test_two_hosts_answer_like_one_rank(
    lab: Lab, request: pytest.FixtureRequest, name: str, backend: str, strategy: str
) -> None:
    model = request.getfixturevalue(name)
    if name == "demo_checkpoint":
        _single[model] = DEMO_ANSWER
    elif model not in _single:
        _single[model], _ = _launch(lab, model, "k2a", "local", "single")
    answer, said = _launch(lab, model, "k2a,k2b", backend, strategy)
    assert answer == _single[model]
    assert len(answer) > 8
    assert "rank 1 on k2b: loaded" in said
    if strategy == "tensor":
        assert "link check: 399 tokens came out equal twice on all ranks" in said
    # Only the host that launched keeps a record of the run.
    folder = "/run/home/.local/state/k2/runs"
    assert lab.exec("k2b", ["find", folder, "-type", "f"]).stdout == ""


def test_one_machine_launches_on_two_others(lab: Lab, toy_k2: Path) -> None:
    """Launch from the console, which has no rank and no model; the leader serves the API."""
    hidden = str(toy_k2.parent)
    lab.exec("console", ["mount", "-t", "tmpfs", "none", hidden])
    run = LabRun(lab, toy_k2, "ring", "pipeline", detach=True, host="console")
    try:
        assert run.talk.wait_end(90) == 0, run.talk.text
        assert _answer(lab)
        assert "rank 0 on k2a: loaded" in run.talk.text
        done = lab.exec("k2a", [sys.executable, "-c", STATUS], timeout_seconds=30)
        ranks = json.loads(done.stdout)["ranks"]
        assert [rank["node"] for rank in ranks] == ["k2a", "k2b"]
        for rank in ranks:  # that of k2b has come over the connection of its guard
            memory = rank["memory"]
            weights, used, peak = (memory[f"{name}_bytes"] for name in ("weights", "used", "peak"))
            assert 0 < weights <= used <= peak < memory["planned_bytes"]
            assert peak < memory["resident_bytes"]
        stopped = lab.exec("console", [sys.executable, "-m", "k2cli", "stop", "--all"])
        assert stopped.returncode == 0, stopped.stderr
        assert run.wait_gone(10)
    finally:
        run.close()
