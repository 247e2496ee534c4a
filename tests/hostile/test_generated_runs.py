"""Generated files of runs and of settings: records, plans, bootstraps, locks, calibrations."""

from __future__ import annotations

import copy
import functools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from k2cli.access.key_file import key_file, read_keys
from k2cli.access.key_ring import KeyRing
from k2cli.agent.locks import Claim, list_locks, lock_path
from k2cli.commands.bench import _plan_of
from k2cli.errors import UsageError
from k2cli.guard.main import read_bootstrap
from k2cli.guard.oom_evidence import counted_kills, counter_file, find_in_jetsam_report, find_in_log
from k2cli.launch.plan import check_plan
from k2cli.launch.specification import RunSpecification, read_specification
from k2cli.nodes.local import LocalNode
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.plan import plan_from_json, plan_to_json, read_plan
from k2cli.planning.speed.calibrations import calibration_file, with_calibration
from k2cli.protocol import Assignment, Bootstrap, HttpEndpoint, KeyLimits, NamedKey
from k2cli.runs.log import format_entry, parse_entry
from k2cli.runs.record import (
    AttemptRecord,
    FailureRecord,
    RankRecord,
    RunRecord,
    find_run,
    list_runs,
    read_record,
)
from k2cli.settings import runs_directory
from k2cli.ui.key_table import print_keys
from k2cli.ui.run_table import print_runs
from tests.hostile.mutation import (
    bounded,
    generated,
    mutated_json,
    mutated_text,
    reads_or_refuses,
)
from tests.planning.plans import make_plan

RECORD = RunRecord(
    "demo-1", "demo", "demo", "failed", "ring", "pipeline", 64,
    (RankRecord(0, "localhost", 1, 2, 3, 4, 5, 0.5), RankRecord(1, "localhost")), 1e9, "h", 80,
    "http://h:80", 2**22 + 1, 1.0, "boot 5", 1e9 + 5, "cause", FailureRecord("c", 0, "n", -9,
    ("l",)),
    "always", (AttemptRecord(1, 1.0, 2.0, "c", FailureRecord("c")),), {"a": "b"}, {"n": "p"},
)  # fmt: skip
ASSIGNMENT = Assignment(
    "demo-1", 0, 2, ["a", "b"], "ring", "/m", "pipeline", [(0, 4), (4, 8)], "float16", 64, 2, 16,
    [1, 2], [3, 4], "sharded", [["10.0.0.1:80"], ["10.0.0.2:80"]], 5, 6, [[None, "d"], [["e"],
    None]],
    "10.0.0.1:81", True,
)  # fmt: skip
BOOTSTRAP = Bootstrap(
    ASSIGNMENT, "ab" * 32, "10.0.0.1", 80, "demo", HttpEndpoint("h", 80, "key", True, ["n"], ["*"]),
    {"A": "b"}, restarts=True, hold="cause",
)  # fmt: skip
CALIBRATION = {
    "entries": [{
        "machines": [["a", 1], ["b", 2]], "backend": "ring", "model": "demo",
        "measured_on": "2026-11-01", "collective_seconds": 1e-5, "deviation": 0.1,
        "rates": {"decode_bytes_per_second": 1e9},
    }],
    "schema_version": 1,
}  # fmt: skip
JETSAM = {
    "memoryStatus": {"pageSize": 16384},
    "processes": [{"pid": 7, "name": "python", "rpages": 5, "reason": "per-process-limit"},
                  {"pid": 8, "name": "x", "rpages": 1}],
}  # fmt: skip
KERNEL = """\
6,1,2,-;Linux version 6.1
python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
Memory cgroup out of memory: Killed process 7 (python) total-vm:9kB, anon-rss:5kB, file-rss:1kB
Out of memory: Killed process 8 (x) total-vm:1kB, anon-rss:2kB, file-rss:3kB, shmem-rss:4kB,
UID:0"""
CGROUPS = "12:cpu,memory:/a/b\n1:name=systemd:/x\n0::/user.slice"
LOG = "2026-01-31T12:00:00.123+01:00 node 0 | text | more\nplain\n2026-01-31T12:00:00Z a - | b"


def document(value: Any) -> Any:
    return msgspec.to_builtins(value)


@generated(250)
def test_record(draw: Random) -> None:
    folder = runs_directory() / "demo-1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_bytes(mutated_json(document(RECORD), draw))
    left_out: list[str] = []
    with bounded():
        read_record(folder)
        runs = list_runs(lambda run_id, text: left_out.append(text))
        print_runs(runs, {})
    assert len(runs) + len(left_out) == 1
    assert all(str(folder) in line for line in left_out)
    reads_or_refuses(find_run)
    reads_or_refuses(lambda: find_run("demo"), "demo-1")


@functools.cache
def plan_document() -> tuple[str, Any]:
    """Return the plan of a small model for two machines, as its launch reads it."""
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 8, "vocab_size": 128,
        "num_attention_heads": 4, "intermediate_size": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="k2-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # all draws use it
    (Path(folder) / "config.json").write_text(json.dumps(config))
    plan = make_plan(folder, parse_hardware("2x m3-ultra-512"))
    return folder, json.loads(plan_to_json(plan))


@generated(150)
def test_plan(tmp_path: Path, draw: Random) -> None:
    model, plain = plan_document()
    path = tmp_path / "plan.json"
    path.write_bytes(mutated_json(plain, draw))
    plan = reads_or_refuses(lambda: read_plan(path), str(path))
    if plan is None:
        return
    with bounded():
        assert plan_from_json(plan_to_json(plan), "again") == plan or "nan" in repr(plan)
    nodes = [LocalNode()] * 2
    reads_or_refuses(lambda: check_plan(plan, Path(model), nodes, force=False))
    for part in plan.placement.ranks:
        first, past = part.layers
        assert 0 <= first <= past <= plan.placement.layer_count
    assert plan.request.context_length > 0
    assert plan.request.concurrency > 0
    assert plan.request.prefill_chunk_tokens > 0
    assert all(0 <= node.weights_bytes < 2**63 for node in plan.nodes)


@pytest.mark.parametrize("size", [-1, 2**62, 10**30])
@pytest.mark.parametrize(
    ("part", "name"), [("nodes", "weights_bytes"), ("request", "context_length")]
)
def test_a_plan_with_impossible_sizes_is_refused(part: str, name: str, size: int) -> None:
    _, plain = plan_document()
    changed = copy.deepcopy(plain)
    target = changed[part][1] if part == "nodes" else changed[part]
    target[name] = size
    with pytest.raises(UsageError, match=f"plan.json is not a plan: {name}"):
        plan_from_json(json.dumps(changed).encode(), "plan.json")


@generated(120)
def test_plan_of_a_run(draw: Random) -> None:
    record = replace(RECORD, run_id="demo-2")
    record.folder.mkdir(parents=True, exist_ok=True)
    (record.folder / "plan.json").write_bytes(mutated_json(plan_document()[1], draw))
    reads_or_refuses(lambda: _plan_of(record), "plan.json")


@generated(200)
def test_bootstrap(draw: Random) -> None:
    folder = runs_directory() / "demo-1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bootstrap-0.json").write_bytes(mutated_json(document(BOOTSTRAP), draw))
    reads_or_refuses(lambda: read_bootstrap("demo-1", "bootstrap-{rank}.json", 0), str(folder))
    assert not (folder / "bootstrap-0.json").exists()


@generated(200)
def test_specification(tmp_path: Path, draw: Random) -> None:
    whole = RunSpecification(
        [BOOTSTRAP, BOOTSTRAP], "k2cli.rank.main", "/s", ["10.0.0.0/8"], {"a": "/"}
    )
    (tmp_path / "launch.json").write_bytes(mutated_json(document(whole), draw))
    read = reads_or_refuses(lambda: read_specification(tmp_path), str(tmp_path))
    if read is not None:
        assert read.run_id is not None
        assert read.nodes is not None


@generated(200)
def test_lock(draw: Random) -> None:
    claim = Claim("demo-1", "u", socket.gethostname(), os.getpid(), 1.0, 5, 6, 7.0, "boot 5")
    path = lock_path("demo-1")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated_json(document(claim), draw))
    with bounded():
        list_locks(lambda run_id: 0)


@generated(200)
def test_calibration(draw: Random) -> None:
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated_json(CALIBRATION, draw))
    nodes = [
        NodeMemory(name, size, size, "exact", "metal", "") for name, size in (("a", 1), ("b", 2))
    ]
    reads_or_refuses(lambda: with_calibration(nodes, "ring"), str(path))


@generated(200)
def test_named_keys(draw: Random) -> None:
    key = NamedKey("alice", "0" * 8, "5e" * 32, 1.8e9, 1.9e9, KeyLimits(2, 4, 60_000))
    other = NamedKey("bob", "1" * 8, "6f" * 32, 1.8e9)
    plain = {"schema_version": 1, "keys": [document(key), document(other)]}
    path = key_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_bytes(mutated_json(plain, draw))
    path.chmod(0o600)
    keys = reads_or_refuses(read_keys, str(path))
    if keys is not None:
        with bounded():
            print_keys(keys)
            ring = KeyRing("k2-own", keys)
            assert ring.identify([b"k2-own"]) is ring.owner


@generated(250)
def test_reports_of_the_kernel(draw: Random) -> None:
    head = '{"bug_type":"298"}\n'
    report = head + mutated_json(JETSAM, draw).decode(errors="replace")
    lines = mutated_text(KERNEL, draw).splitlines()
    cgroups = mutated_text(CGROUPS, draw)
    looks: list[Callable[[], Any]] = [
        lambda: find_in_jetsam_report(report, 7),
        lambda: find_in_log(lines, 7),
        lambda: counted_kills(mutated_text("low 0\noom 1\noom_kill 2", draw)),
    ]
    reads_or_refuses(lambda: counter_file(cgroups), "", ValueError)
    for look in looks:
        with bounded():
            str(look())


@generated(250)
def test_log(draw: Random) -> None:
    for line in mutated_text(LOG, draw).split("\n"):
        with bounded():
            entry = parse_entry(line)
            assert len(format_entry(entry).splitlines()) <= 1
