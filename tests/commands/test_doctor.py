"""``k2 doctor`` on this machine, with its real commands, and from recordings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from k2cli.agent.run_processes import processes_of_run
from k2cli.cli import build_app
from k2cli.commands import deep_check as deep_check_module
from k2cli.commands.deep_check import DeepOptions, deep_check, lengths_up_to
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.launch.prepare import prepare_run
from k2cli.launch.request import LaunchRequest
from k2cli.nodes.locks import BusyError, release_locks
from k2cli.runs.record import RunRecord, find_run, list_runs
from k2cli.runs.stop import stop_run
from k2cli.settings import runs_directory
from k2cli.ui.run_table import print_runs
from tests.runs.test_record import make_record
from tests.support.commands import K2, k2
from tests.support.gpu_host import make_gpu_host

DATA = Path(__file__).resolve().parents[1] / "doctor" / "data"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "STATE", "DATA"):
        monkeypatch.setenv(f"K2_{name}_DIR", str(tmp_path / name.lower()))


def _k2(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["doctor", *arguments])


def test_this_machine_with_its_own_commands(tmp_path: Path) -> None:
    """Recorded while it is examined; the recording gives the same findings."""
    done = _k2("--json", "--record", str(tmp_path / "out"))
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    [node] = document["nodes"]
    assert node["machine"]["memory_bytes"] > 0
    assert node["software"]["mlx_version"]
    found = {check["name"]: check["status"] for check in document["checks"]}
    assert found["ssh"] == found["mlx version"] == found["clock"] == "pass"
    assert found["disk speed"] == "skip"  # no model in the folder of this test
    assert document["recommendation"]["backend"] == "local"
    assert done.exit_code == (5 if document["status"] == "fail" else 0)
    again = json.loads(_k2("--json", "--replay", str(tmp_path / "out")).stdout)
    assert [check["status"] for check in again["checks"]] == [
        check["status"] for check in document["checks"]
    ]


def test_a_node_that_cannot_be_reached_is_a_finding_with_its_mending() -> None:
    done = _k2("--quick", "--nodes", "localhost,no-such-host.invalid")
    assert done.exit_code == 5
    assert "FAIL  ssh" in done.stdout
    assert "no-such-host.invalid" in done.stdout
    assert "fix:" in done.stdout
    assert "ok    ssh             localhost" in done.stdout


def test_for_people_it_fits_80_columns() -> None:
    done = _k2("--replay", str(DATA / "m5-max-pair-as-published"))
    assert done.exit_code == 5
    lines = done.stdout.splitlines()
    # What is to be copied into a shell is not broken.
    assert all(len(line) <= 80 for line in lines if "fix:" not in line)
    assert lines[-1] == "2 failed, 2 warned, 5 passed"


def test_warnings_alone_exit_with_0() -> None:
    done = _k2("--replay", str(DATA / "healthy-pair"))
    assert done.exit_code == 0
    assert "transport:            jaccl" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("here", "--nodes", "there"),
        ("--nodes", ","),
        ("--nodes", "a", "--replay", str(DATA / "healthy-pair")),
        ("--replay", str(DATA)),
        ("--plan", "/no/such/plan"),
        ("no-such-cluster",),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(arguments: tuple[str, ...]) -> None:
    done = _k2(*arguments)
    assert isinstance(done.exception, K2Error)
    assert done.exception.exit_code == 2
    assert any(argument in done.exception.message for argument in arguments)


def test_a_recording_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = _k2("--replay", str(DATA / "healthy-pair"), "--record", str(tmp_path))
    assert isinstance(done.exception, K2Error)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_recording_names_no_file_outside_of_it(tmp_path: Path) -> None:
    text = (DATA / "healthy-pair/manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(
        text.replace("node-1/hostname.txt", "../../../etc/passwd")
    )
    done = _k2("--replay", str(tmp_path))
    assert isinstance(done.exception, K2Error)
    assert "outside" in done.exception.message


def test_lengths_grow_up_to_the_longest() -> None:
    assert lengths_up_to(8192) == (1024, 2048, 4096, 8192)
    assert lengths_up_to(5000) == (1024, 2048, 4096, 5000)
    assert lengths_up_to(64) == (64,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deep"], "there is one node"),
        (["--deep", "--replay", str(DATA / "healthy-pair")], "--replay has none"),
        (["--most-tokens", "64"], "--most-tokens is for --deep alone"),
    ],
)
def test_deep_needs_ranks_to_compare(arguments: list[str], message: str) -> None:
    done = _k2("--quick", *arguments)
    assert isinstance(done.exception, UsageError)
    assert message in done.exception.message
    assert done.output == ""  # nothing was examined before


@pytest.mark.parametrize(
    ("hint", "remedy"),
    [
        ("to wait for its end: --wait 600; or if both fit: --share", "k2 stop demo-1"),
        ("k2 cluster clean --nodes localhost", "k2 cluster clean --nodes localhost"),
    ],
)
def test_deep_beside_a_run_has_a_remedy_that_the_doctor_knows(
    hint: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(request: LaunchRequest) -> None:
        raise BusyError("node localhost is in use by demo-1", hint, "demo-1")

    monkeypatch.setattr("k2cli.commands.deep_check._run", run)
    options = DeepOptions(None, "localhost,localhost", "auto", None, "demo", 1024)
    found = deep_check(options, possible=True)
    assert found.status == "fail"
    assert (found.detail, found.hint) == (
        "not compared: node localhost is in use by demo-1",
        remedy,
    )


def test_a_node_that_is_gone_does_not_hide_what_the_deep_check_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model cannot be removed there; those of the other nodes are, and the result is told."""
    removed: list[str] = []

    def ask(name: str, verb: str) -> str:
        if verb == "remove-folder" and name == "first":
            raise ClusterError("node first does not answer")
        if verb == "remove-folder":
            removed.append(name)
        return "/made"

    def node_named(name: str) -> Any:
        node = SimpleNamespace(name=name, is_local=True)
        node.ask = lambda kind, verb, *arguments: ask(name, verb)
        return node

    monkeypatch.setattr("k2cli.cluster.node_lookup.node_named", node_named)
    with deep_check_module._model(None, ["first", "second", "second"]):
        assert removed == []
    assert removed == ["second"]
    assert "on first: /made is left: node first does not answer" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.ranks
def test_deep_with_k2s_own_model_on_this_machine(tmp_path: Path) -> None:
    folders = {"K2_CACHE_DIR": str(tmp_path / "cache")}
    nodes = ("--nodes", "localhost,localhost", "--most-tokens", "40")
    done = k2("doctor", "--quick", "--deep", *nodes, "--json", **folders)
    [found] = [each for each in json.loads(done.stdout)["checks"] if each["name"] == "link data"]
    assert found["status"] == "pass", done.stderr
    assert "prompts of up to 40 tokens" in found["detail"]
    assert not list((tmp_path / "cache").glob("link-check-model*"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.soak) for each in (signal.SIGHUP, signal.SIGINT)),
    ],
    ids=lambda how: how.name,
)
def test_the_ranks_of_deep_end_with_the_command_however_that_ends(
    toy_k2: Path, how: signal.Signals
) -> None:
    nodes = ("--nodes", "localhost,localhost", "--model", str(toy_k2), "--most-tokens", "2000")
    with subprocess.Popen(
        [*K2, "doctor", "--quick", "--deep", *nodes],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as doctor:  # fmt: skip
        run = _wait_for_run("loading")
        doctor.send_signal(how)
    assert doctor.returncode == (-how if how == signal.SIGKILL else 130)
    _wait_until_forgotten()
    assert not processes_of_run(run.run_id)
    assert not run.folder.exists()


@pytest.mark.ranks
def test_the_run_of_deep_is_listed_and_can_be_stopped_until_it_is_over(
    toy_k2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = ("--nodes", "localhost,localhost", "--model", str(toy_k2), "--most-tokens", "40")
    before = make_record("stopped")
    done = k2("doctor", "--quick", "--deep", *nodes, "--json")
    [found] = [each for each in json.loads(done.stdout)["checks"] if each["name"] == "link data"]
    assert found["status"] == "pass", done.stderr
    assert list_runs() == [before]
    assert [path.name for path in runs_directory().iterdir()] == [before.run_id]

    # Stopped from elsewhere: the check fails in words, and its run is gone as well.
    with subprocess.Popen(
        [*K2, "doctor", "--quick", "--deep", *nodes[:-1], "2000", "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as doctor:  # fmt: skip
        run = _wait_for_run("loading")
        print_runs([find_run(run.run_id)], {})
        assert stop_run(run).state == "stopped"
        output, _ = doctor.communicate(timeout=60)
    assert "started by k2 doctor --deep; it ends with the check" in capsys.readouterr().out
    [found] = [each for each in json.loads(output)["checks"] if each["name"] == "link data"]
    assert (found["status"], "was stopped before it was ready" in found["detail"]) == ("fail", True)
    _wait_until_forgotten(before)


def _wait_until_forgotten(*others: RunRecord, limit_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while list_runs() != list(others) or len(list(runs_directory().iterdir())) != len(others):
        assert time.monotonic() < deadline, list_runs()
        time.sleep(0.02)


def _wait_for_run(state: str, limit_seconds: float = 60.0) -> RunRecord:
    deadline = time.monotonic() + limit_seconds
    while not (runs := [run for run in list_runs() if run.state == state]):
        assert time.monotonic() < deadline, list_runs()
        time.sleep(0.02)
    return runs[0]


def test_gpus_are_named_with_who_uses_them_and_a_plan_is_checked_on_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_k2: Path
) -> None:
    host = make_gpu_host(tmp_path / "host", 2, monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    idle = json.loads(_k2("--quick", "--json").stdout)
    assert [gpu["name"]["index"] for gpu in idle["nodes"][0]["machine"]["gpus"]] == [0, 1]
    found = {check["detail"]: check["status"] for check in _of(idle, "GPU")}
    assert list(found.values()) == ["pass", "pass"]
    host.use(1, 4321, "trainer", 143_000)
    plan = tmp_path / "plan.json"
    run = prepare_run(LaunchRequest(str(toy_k2), nodes=("localhost",)))
    document = json.loads((run.record.folder / "plan.json").read_text())
    document["nodes"][0]["total_bytes"] = 140_000_000_000
    document["nodes"] *= 2
    document["placement"] = {
        "strategy": "tensor",
        "ranks": [{**document["placement"]["ranks"][0], "rank": rank} for rank in (0, 1)],
    }
    plan.write_text(json.dumps(document))
    busy = json.loads(_k2("--quick", "--json", "--plan", str(plan)).stdout)
    told = [check["detail"] for check in _of(busy, "GPU") if check["status"] == "warn"]
    assert f"held by {run.run_id}" in told[0]
    assert "used by trainer (4321) 149.9 GB" in told[1]
    release_locks(run.nodes, run.run_id)
    busy = json.loads(_k2("--quick", "--json", "--plan", str(plan)).stdout)
    (memory,) = _of(busy, "GPU memory")
    assert memory["status"] == "fail"
    assert "the plan needs 140.0 GB on GPU 1" in memory["detail"]


def test_gpus_that_mlx_does_not_use_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        make_gpu_host(tmp_path / "host", 1, patch)
    monkeypatch.setenv("PATH", f"{tmp_path / 'host'}:{os.environ['PATH']}")
    (told,) = _of(json.loads(_k2("--quick", "--json").stdout), "GPU")
    assert told["status"] == "warn"
    assert "built without CUDA" in told["detail"]
    assert "GPU 0 (NVIDIA H200)" in told["detail"]


def _of(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [check for check in document["checks"] if check["name"] == name]
