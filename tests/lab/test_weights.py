"""Weights between lab, by a real sshd: whole and in parts, broken and continued, over a third."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.runs import Talk, wait_for
from tests.models.mock_hub import COMMIT
from tests.support.weights import in_many_files, random_model

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]
K2 = [sys.executable, "-m", "k2cli"]
MODEL = "/run/home/models/big"
MEGABYTES = 48
ROOT = Path(__file__).resolve().parents[2]


def _push(lab: Lab, *options: str, host: str = "k2a") -> subprocess.CompletedProcess[str]:
    return lab.exec(host, [*K2, "models", "push", MODEL, *options], timeout_seconds=120)


def _nodes(text: str) -> dict[str, Any]:
    document = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return {node["node"]: node for node in document["nodes"]}


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _model(lab: Lab, host: str = "k2a", files: int = 3) -> Path:
    return random_model(lab.host(host).home / "models" / "big", files, MEGABYTES * 2**20)


def _there(lab: Lab, host: str = "k2b") -> Path:
    return lab.host(host).home / "models" / "big"


def _listening(lab: Lab, host: str) -> set[int]:
    """Return the TCP ports on which something listens."""
    lines = Path(f"/proc/{lab.host(host).state.pid}/net/tcp").read_text().splitlines()[1:]
    return {int(line.split()[1].partition(":")[2], 16) for line in lines if line.split()[3] == "0A"}


def _confirmed(lab: Lab, host: str = "k2b") -> int:
    """Count the segments that an unfinished transfer has confirmed on a host."""
    journals = list(_there(lab, host).glob(".model-*.k2-journal"))
    with contextlib.suppress(OSError):
        done = sum(MEGABYTES > 0 for _ in _there(lab, host).glob("*.safetensors"))
        return done + sum(len(path.read_text().splitlines()) for path in journals)
    return 0


@pytest.mark.parametrize("over", ["auto", "ssh", "copy"])
def test_a_push_brings_the_model_and_leaves_nothing_open(lab: Lab, over: str) -> None:
    if over == "copy" and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed: apt-get install rsync")
    source = _model(lab, files=2)
    done = _push(lab, "k2b", "--over", over, "--json")
    assert done.returncode == 0, done.stderr
    node = _nodes(done.stdout)["k2b"]
    assert node["route"] == {"auto": "TLS to 10.88.0.2", "ssh": "inside ssh", "copy": "rsync"}[over]
    assert _contents(_there(lab)) == _contents(source)
    assert _listening(lab, "k2b") == {22}
    assert wait_for(lambda: lab.process_count("k2b") == 0, 10)
    again = _push(lab, "k2b", "--json")
    assert again.returncode == 0, again.stderr
    assert _nodes(again.stdout)["k2b"]["sent_bytes"] == 0


@pytest.mark.parametrize(
    "fault",
    [
        "receiver",
        pytest.param("link", marks=pytest.mark.soak),
        pytest.param("launcher", marks=pytest.mark.soak),
        pytest.param("sender", marks=pytest.mark.soak),
        pytest.param("interrupt", marks=pytest.mark.soak),
    ],
)
def test_a_broken_push_goes_on_where_it_was(lab: Lab, fault: str) -> None:
    source = _model(lab)
    lab.link.set(rate_mbit=300)
    talk = Talk(lab.start("k2a", [*K2, "models", "push", MODEL, "k2b", "--json"]))
    assert wait_for(lambda: _confirmed(lab) >= 1, 60), talk.text
    lab.link.set(rate_mbit=5)  # the push must not end before the fault, however slow the machine is
    if fault == "receiver":
        removed = lab.exec("k2a", [*K2, "models", "remove", MODEL, "--yes"])
        assert "is being sent by a running push" in removed.stderr
    _break(lab, talk, fault)
    lab.link.set(rate_mbit=300)
    if fault in ("launcher", "interrupt"):
        status = talk.wait_end(60)
        assert status == (130 if fault == "interrupt" else -signal.SIGKILL)
        if fault == "interrupt":
            assert f"to continue: k2 models push {MODEL} k2b" in talk.text
        assert wait_for(lambda: lab.process_count("k2b") == 0, 30)
        assert _listening(lab, "k2b") == {22}
        done = _push(lab, "k2b", "--json")
        assert done.returncode == 0, done.stderr
        node = _nodes(done.stdout)["k2b"]
    else:
        assert talk.wait_end(150) == 0, talk.text
        assert talk.said("trying again")
        node = _nodes(talk.text)["k2b"]
    assert node["was_there_bytes"] > 16 * 2**20
    assert _contents(_there(lab)) == _contents(source)


def _break(lab: Lab, talk: Talk, fault: str) -> None:
    if fault == "link":
        lab.link_down("k2b")
        assert wait_for(lambda: talk.said("trying again"), 60), talk.text
        lab.link_up("k2b")
        return
    host, word = {
        "receiver": ("k2b", "weights.receive"),
        "sender": ("k2a", "weights.send"),
        "launcher": ("k2a", "models push"),
        "interrupt": ("k2a", "models push"),
    }[fault]
    number = signal.SIGINT if fault == "interrupt" else signal.SIGKILL
    for process in lab.processes(host):
        if word in process.command and process.command.split()[0].endswith(("python", "python3")):
            os.kill(process.pid, number)


def test_a_full_disk_is_told_before_and_during_a_push(lab: Lab) -> None:
    source = _model(lab)
    _there(lab).mkdir(parents=True)
    lab.exec("k2b", ["mount", "-t", "tmpfs", "-o", "size=100m", "none", MODEL])
    try:
        before = _push(lab, "k2b")
        assert before.returncode == 5
        assert "node k2b has 10" in before.stderr
        assert "MB free" in before.stderr
        lab.exec("k2b", ["mount", "-o", "remount,size=230m", MODEL])
        lab.link.set(rate_mbit=300)
        talk = Talk(lab.start("k2a", [*K2, "models", "push", MODEL, "k2b"]))
        journals = ["sh", "-c", f"cat {MODEL}/.model-*.k2-journal 2>/dev/null | wc -l"]
        assert wait_for(lambda: int(lab.exec("k2b", journals).stdout) >= 1, 60)
        lab.exec("k2b", ["dd", "if=/dev/zero", f"of={MODEL}/fill.bin", "bs=1M", "count=300"])
        assert talk.wait_end(90) == 5, talk.text
        # The second one if the connection was seen to break first, and the host was asked again.
        assert "No space left on device" in talk.text or "node k2b has 0 B free" in talk.text
        lab.link.set()
        lab.exec("k2b", ["rm", f"{MODEL}/fill.bin"])
        done = _push(lab, "k2b", "--json")
        assert done.returncode == 0, done.stderr
        assert _nodes(done.stdout)["k2b"]["was_there_bytes"] > 16 * 2**20
        compared = lab.exec("k2b", ["sh", "-c", f"cd {MODEL}; cat model-*.safetensors | md5sum"])
        whole = b"".join(data for name, data in _contents(source).items() if "model-" in name)
        assert compared.stdout.split()[0] == hashlib.md5(whole).hexdigest()
    finally:
        lab.exec("k2b", ["umount", "-l", MODEL])


def test_another_revision_is_refused_and_can_be_replaced(lab: Lab) -> None:
    source = random_model(lab.host("k2a").home / "models" / "big", 2, 2**20, seed=1)
    random_model(_there(lab), 2, 2**20, seed=2)
    refused = _push(lab, "k2b")
    assert refused.returncode == 5
    assert "node k2b has another config.json" in refused.stderr
    assert f"k2 models push {MODEL} k2b --replace" in refused.stderr
    assert b'"seed": 2' in (_there(lab) / "config.json").read_bytes()
    done = _push(lab, "k2b", "--replace")
    assert done.returncode == 0, done.stderr
    assert _contents(_there(lab)) == _contents(source)


def test_a_second_host_passes_on_to_the_third(lab: Lab) -> None:
    """The console sends to k2a alone, and k2a to k2b."""
    source = _model(lab, "console", files=4)
    counter = Path(f"/proc/{lab.console.state.pid}/net/dev")

    done = _push(lab, "k2a", "k2b", "--json", host="console")
    assert done.returncode == 0, done.stderr
    assert counter.is_file()
    for host in ("k2a", "k2b"):
        assert _contents(_there(lab, host)) == _contents(source)
    # What k2b received came from k2a: its sender ran there, as the route's address shows.
    assert _nodes(done.stdout)["k2b"]["route"] == "TLS to 10.88.0.2"
    sent = {name: node["sent_bytes"] for name, node in _nodes(done.stdout).items()}
    assert sent["k2a"] == sent["k2b"] > 4 * MEGABYTES * 2**20


def test_a_launch_brings_each_node_what_its_ranks_read(lab: Lab, toy_k2: Path) -> None:
    source = in_many_files(toy_k2, lab.host("k2a").home / "models" / "big")
    launch = [*K2, "launch", MODEL, "--nodes", "k2a,k2b", "--backend", "ring", "--detach"]
    launch += ["--parallel", "pipeline", "--context", "256", "--concurrency", "1"]
    lacking = lab.exec("k2a", launch, timeout_seconds=90)
    assert lacking.returncode == 5
    assert "node k2b lacks 3.4 MB" in lacking.stderr
    assert f"k2 models push {MODEL} k2b" in lacking.stderr
    done = lab.exec("k2a", [*launch, "--fetch"], timeout_seconds=120)
    assert done.returncode == 0, done.stderr
    assert "rank 1 on k2b: loaded" in done.stderr
    stopped = lab.exec("k2a", [*K2, "stop", "--all"])
    assert stopped.returncode == 0, stopped.stderr
    whole, part = (sorted(p.name for p in f.glob("*.safetensors")) for f in (source, _there(lab)))
    assert 0 < len(part) < len(whole)
    # The part is enough for its own ranks alone, and no whole model to other commands.
    other = lab.exec("k2a", [*launch, "--nodes", "k2b,k2a"], timeout_seconds=90)
    assert other.returncode == 5
    assert "node k2b lacks 3.0 MB" in other.stderr
    alone = lab.exec("k2b", [*K2, "quantize", MODEL, "--bits", "4", "--to", "q"])
    assert alone.returncode == 1
    assert "only the part that a launch needs here" in alone.stderr
    # A node that has one older file is refused, as before.
    config = _there(lab) / "config.json"
    config.write_text(config.read_text().replace('"kimi_k2"', '"kimi_k2", "older": 1', 1))
    older = lab.exec("k2a", launch, timeout_seconds=90)
    assert older.returncode == 5
    assert f"node k2b has another {MODEL}" in older.stderr


def test_the_models_of_each_host_are_listed_and_removed(lab: Lab) -> None:
    """k2a removes what it pushed to k2b, but not its own folder, which the user made."""
    source = _model(lab, files=2)
    assert _push(lab, "k2b").returncode == 0
    (_there(lab) / "notes.txt").write_text("the user's")
    listed = lab.exec("k2a", [*K2, "models", "list", "--nodes", "k2a,k2b", "--json"])
    assert listed.returncode == 0, listed.stderr
    nodes = _nodes(listed.stdout)
    (model,) = (each for each in nodes["k2b"]["models"] if each["folder"] == MODEL)
    assert model["state"] == "complete"
    assert model["verified"]["by"] == "push"
    refused = lab.exec("k2a", [*K2, "models", "remove", MODEL, "--yes"])
    assert refused.returncode == 1
    assert "it did not write this folder" in refused.stderr
    done = lab.exec("k2a", [*K2, "models", "remove", MODEL, "--nodes", "k2b", "--yes"])
    assert done.returncode == 0, done.stderr
    assert _contents(_there(lab)) == {"notes.txt": b"the user's"}
    assert (source / "config.json").exists()


HUB = """
import sys, time
from pathlib import Path
from tests.models.mock_hub import mock_hub
with mock_hub(Path(sys.argv[1])) as (url, requested):
    print(url, flush=True)
    time.sleep(200)
"""


def test_a_download_for_a_cluster_asks_the_hub_once(lab: Lab) -> None:
    """k2a downloads, k2b gets the model from k2a, in the Hub's cache of each."""
    files = random_model(lab.host("k2a").home / "models" / "hub", 3, 3 * 2**20)
    (files / "tokenizer.json").write_text("{}")
    hub = Talk(lab.start("k2a", [sys.executable, "-c", HUB, "models/hub"]))
    assert wait_for(lambda: "http" in hub.text, 30), hub.text
    settings = {"HF_ENDPOINT": hub.text.split()[0], "NO_PROXY": "*"}
    made = lab.exec("k2a", [*K2, "cluster", "init", "localhost", "k2b", "--name", "pair"])
    assert made.returncode == 0, made.stderr
    command = [*K2, "download", "mock/model", "--cluster", "pair", "--json"]
    names = {path.name for path in files.iterdir()}

    def would_get() -> dict[str, int]:
        dry = lab.exec("k2a", [*command, "--dry-run"], settings)
        assert dry.returncode == 0, dry.stderr
        return {file["name"]: file["missing_bytes"] for file in _nodes(dry.stdout)["k2b"]["files"]}

    assert would_get() == {name: (files / name).stat().st_size for name in names}
    assert not (lab.host("k2b").home / ".cache" / "huggingface").exists()
    small = [*command, "--only", "tokenizer", "--limit-rate", "50M"]
    done = lab.exec("k2a", small, settings)
    assert done.returncode == 0, done.stderr
    assert {name for name, missing in would_get().items() if not missing} == {"tokenizer.json"}
    done = lab.exec("k2a", command, settings)
    assert done.returncode == 0, done.stderr
    assert [*_nodes(done.stdout)] == ["k2b"]
    assert not any(would_get().values())
    for host in ("k2a", "k2b"):
        snapshot = lab.host(host).home / ".cache/huggingface/hub/models--mock--model/snapshots"
        found = {
            name: data
            for name, data in _contents(snapshot / COMMIT).items()
            if not name.startswith(".")
        }
        assert found == _contents(files)
    offline = {"HF_HUB_OFFLINE": "1"}
    there = lab.exec("k2b", [*K2, "download", "mock/model"], offline)
    assert there.returncode == 0, there.stderr
    assert "is already at" in there.stdout
    # The receiver has the record, and verifies by it; no network is needed.
    checked = lab.exec("k2b", [*K2, "models", "verify", "mock/model", "--json"], offline)
    assert checked.returncode == 0, checked.stderr
    document = json.loads(checked.stdout)
    assert document["commit"] == COMMIT
    assert {file["status"] for file in document["files"]} == {"verified"}
    # A blob of the right size with other bytes is not "there": a push brings it again, alone.
    damaged = snapshot / COMMIT / "model-00002-of-00003.safetensors"
    size = damaged.stat().st_size
    with damaged.open("r+b") as file:
        file.seek(size - 9)
        file.write(b"damage")
    checked = lab.exec("k2b", [*K2, "models", "verify", "mock/model"], offline)
    assert checked.returncode == 1
    assert "model-00002-of-00003.safetensors has another hash" in checked.stdout
    again = lab.exec("k2a", [*K2, "models", "push", "mock/model", "k2b", "--json"], settings)
    assert again.returncode == 0, again.stderr
    assert _nodes(again.stdout)["k2b"]["sent_bytes"] == size
    checked = lab.exec("k2b", [*K2, "models", "verify", "mock/model"], offline)
    assert checked.returncode == 0, checked.stderr
    again = lab.exec("k2a", [*K2, "models", "push", "mock/model", "k2b", "--json"], settings)
    assert _nodes(again.stdout)["k2b"]["sent_bytes"] == 0
