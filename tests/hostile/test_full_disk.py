"""Disks that are full, read-only or broken: a launch is refused, a run goes on, a stop works.

Full disks are small file systems in memory, which need root; other errors are injected.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2cli import files
from k2cli.agent.run_folder import RESERVE_NAME, make_reserve
from k2cli.cluster.description import Cluster, save_cluster
from k2cli.errors import K2Error
from k2cli.models.files import folder_being_made, locked
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import take_locks
from k2cli.protocol import LogLine, RunReady
from k2cli.runs.record import read_record, save_record
from k2cli.runs.stop import stop_run
from k2cli.settings import state_directory
from k2cli.supervisor.journal import Journal
from k2cli.supervisor.log_file import LogFile
from k2cli.supervisor.outcome import Outcome
from tests.runs.test_record import make_record
from tests.support.harness import supervised

CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


def mounted(folder: Path, size: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "k2-test", str(folder)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def fill(folder: Path) -> None:
    """Take all room of the file system."""
    with (folder / "filler").open("ab", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    assert os.statvfs(folder).f_bavail == 0


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder on a file system of 1 MiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "small"
    if not mounted(folder, "1m"):
        pytest.skip("this container may not mount file systems")
    monkeypatch.setenv("K2_STATE_DIR", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def k2(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "k2cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


# --- at launch ----------------------------------------------------------------------------------


def test_a_launch_on_a_full_disk_is_refused_and_leaves_nothing(
    small_disk: Path, toy_k2: Path
) -> None:
    fill(small_disk)
    done = k2("launch", str(toy_k2), "--detach", "--context", "64")
    assert done.returncode in (1, 5), done.stderr
    assert "No space left on device (0 B of 1.0 MB are free)" in done.stderr
    assert "K2_STATE_DIR" in done.stderr
    assert str(small_disk) in done.stderr
    # With some room, but too little for a run.
    (small_disk / "filler").unlink()
    assert k2("ps").returncode == 0
    (small_disk / "locks").mkdir(exist_ok=True)
    (small_disk / "locks" / ".mutex").touch()
    with (small_disk / "filler").open("wb") as filler:
        filler.write(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 40_000))
    done = k2("launch", str(toy_k2), "--detach", "--context", "64")
    assert done.returncode == 1, done.stderr
    assert "runs/" in done.stderr
    assert "No space left on device" in done.stderr
    left = {path.name for path in small_disk.rglob("*") if path.is_file()}
    assert left <= {"filler", ".mutex"}


# --- while running ------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_run_goes_on_and_stops_on_a_full_disk(small_disk: Path) -> None:
    with supervised("ring") as run:
        run.wait_ready()
        (run.record.folder / RESERVE_NAME).unlink(missing_ok=True)
        fill(small_disk)
        log = run.record.log_file
        before = log.stat().st_size
        rank = run.pid_of("rank-1")
        with Path(f"/proc/{rank}/fd/1").open("w") as output:
            output.write("a line for which there is no room\n" * 200)
        time.sleep(3)
        assert run.supervisor.poll() is None
        assert run.record.state == "ready"
        assert log.stat().st_size <= before + 4096
        report = stop_run(run.record)
        assert (report.state, report.killed) == ("stopped", 0)
        assert run.supervisor.wait(20) == 0
        run.wait_gone()
        assert run.record.state == "stopped"
        assert run.record.cause == "stopped"


@pytest.mark.ranks
def test_a_failure_on_a_full_disk_has_its_cause_in_the_record(small_disk: Path) -> None:
    with supervised("ring") as run:
        run.wait_ready()
        make_reserve(run.run_id)
        fill(small_disk)
        os.kill(run.pid_of("rank-1"), signal.SIGKILL)
        assert run.supervisor.wait(30) == 5
        record = run.record
        assert record.state == "failed"
        assert "rank 1" in record.cause
        assert "SIGKILL" in record.cause


# --- the files of a run -------------------------------------------------------------------------


class Disk:
    """Makes every write to the folders of k2 fail with an error of the system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: int | None = None
        self._folders = tuple(os.environ[f"K2_{kind}_DIR"] for kind in ("CONFIG", "STATE"))
        self._open, self._write = os.open, os.write
        self._descriptors: set[int] = set()
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "mkdir", self._failing(os.mkdir))

    def open(self, path: Any, flags: int, *rest: Any, **named: Any) -> int:
        ours = os.fspath(path).startswith(self._folders)
        if ours and flags & os.O_ACCMODE != os.O_RDONLY:
            self._check(path)
        descriptor = self._open(path, flags, *rest, **named)
        (self._descriptors.add if ours else self._descriptors.discard)(descriptor)
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        if descriptor in self._descriptors:
            self._check()
        return self._write(descriptor, data)

    def _failing(self, make: Callable[..., None]) -> Callable[..., None]:
        def made(path: Any, *rest: Any, **named: Any) -> None:
            if not os.path.exists(path):
                self._check(path)
            make(path, *rest, **named)

        return made

    def _check(self, *path: Any) -> None:
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code), *path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("code", CODES)
def test_a_journal_that_cannot_be_written_goes_on_and_catches_up(
    disk: Disk, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record("loading")
    seen: list[Any] = []
    journal = Journal(record, seen.append)
    journal.note(LogLine(0, "localhost", "rank", "before"))
    disk.code = code
    for number in range(5):
        journal.note(LogLine(0, "localhost", "rank", f"lost {number}"))
    journal.note(RunReady("http://127.0.0.1:1"))
    journal.tick()
    kept = read_record(record.folder)
    assert kept is not None
    assert kept.state == "loading"
    disk.code = None
    journal.tick()
    kept = read_record(record.folder)
    assert kept is not None
    assert (kept.state, kept.url) == ("ready", "http://127.0.0.1:1")
    journal.note(LogLine(0, "localhost", "rank", "after"))
    disk.code = code
    final = journal.close(Outcome.failed("its cause"), {})
    assert final.cause == "its cause"
    text = record.log_file.read_text()
    assert "| before\n" in text
    assert "| lost" not in text
    assert "[lines before this one that could not be written: " in text
    assert text.endswith("| after\n")
    said = capfd.readouterr().err
    assert said.count("lines are dropped") == 1
    assert os.strerror(code) in said
    assert [event.text for event in seen if isinstance(event, LogLine)] == [
        "before", *(f"lost {number}" for number in range(5)), "after",
    ]  # fmt: skip


def test_the_reserve_makes_room_for_the_record(small_disk: Path) -> None:
    record = make_record("loading")
    make_reserve(record.run_id)
    fill(small_disk)
    for state in ("ready", "failed"):
        save_record(replace(record, state=state))
        kept = read_record(record.folder)
        assert kept is not None
        assert kept.state == state
    assert not (record.folder / RESERVE_NAME).exists()
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        save_record(replace(record, state="stopped", cause="x" * 8192))
    assert caught.value.filename == str(record.folder / "run.json")
    assert [path.name for path in record.folder.iterdir()] == ["run.json"]


def test_half_a_line_is_taken_back(small_disk: Path) -> None:
    said: list[str] = []
    log = LogFile(small_disk / "log", 2**20, lambda text: text, said.append)
    log.write("first")
    fill(small_disk)
    for _ in range(9):
        log.write("x" * 10_000)  # a part of it would fit into the file's last page
    (small_disk / "filler").unlink()
    log.write("last")
    log.close()
    lines = (small_disk / "log").read_text().splitlines()
    assert lines == ["first", "[lines before this one that could not be written: 9]", "last"]
    assert len(said) == 1
    assert "0 B of 1.0 MB are free" in said[0]


def test_a_log_has_a_largest_size(tmp_path: Path) -> None:
    said: list[str] = []
    log = LogFile(tmp_path / "log", 10_000, lambda text: text, said.append)
    data = LogFile(tmp_path / "data", 10_000, None, said.append)
    for number in range(1_000):
        log.write(f"{number:090}")
        data.write(f"{number:090}")
    log.close()
    data.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30_500
    assert (tmp_path / "log").read_text().splitlines()[-1] == f"{999:090}"
    assert "earlier lines are in" in (tmp_path / "log").read_text().splitlines()[0]
    assert (tmp_path / "data").read_text().splitlines()[0] == f"{0:090}"
    assert len(said) == 1
    assert "largest size" in said[0]


@pytest.mark.parametrize("code", CODES)
def test_a_stop_does_not_need_the_disk(disk: Disk, code: int) -> None:
    record = replace(make_record(), pid=2**22 + 1, state="orphaned")
    save_record(record)
    disk.code = code
    assert stop_run(record).state == "stopped"


# --- the other writers --------------------------------------------------------------------------


def _save_cluster(_: Path) -> None:
    save_cluster(Cluster("x", ()))


def _convert(folder: Path) -> None:
    with folder_being_made(folder / "model") as made:
        (made / "config.json").write_text("x" * 100_000)


def _lock(folder: Path) -> None:
    with locked(folder / "downloads" / ".lock"):
        pass


def _lock_machine(_: Path) -> None:
    take_locks([LocalNode()], "demo-1", {})


def _write_bootstrap(_: Path) -> None:
    LocalNode().write_file("demo-1", "bootstrap-0.json", b"x" * 100_000)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("write", [_save_cluster, _convert, _lock, _lock_machine, _write_bootstrap])
def test_each_writer_names_its_path_and_the_cause(
    disk: Disk, code: int, write: Callable[[Path], None]
) -> None:
    folder = state_directory()
    folder.mkdir(parents=True, exist_ok=True)
    disk.code = code
    with pytest.raises(K2Error) as caught:
        write(folder)
    disk.code = None
    assert os.strerror(code) in caught.value.message
    assert "/state/" in caught.value.message or "/config/" in caught.value.message
    assert caught.value.hint
    assert ("are free" in caught.value.message) == (code in files.FULL_DISK)


@pytest.mark.parametrize("name", ["ps", "cluster list", "logs", "stop --all"])
def test_commands_that_read_work_on_a_full_disk(small_disk: Path, name: str) -> None:
    record = replace(make_record("stopped"), cause="stopped")
    save_record(record)
    (record.log_file).write_text("2026-01-31T12:00:00.123+01:00 node 0 | hello\n")
    fill(small_disk)
    done = k2(*name.split())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_to_a_full_disk(stream: str) -> None:
    with Path("/dev/full").open("w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        for command, code in ((["ps", "--json"], 0), (["plan-memory", "./nosuch"], 2)):
            done = subprocess.run(
                [sys.executable, "-m", "k2cli", *command], text=True, timeout=60, check=False,
                **streams,  # type: ignore[arg-type]
            )  # fmt: skip
            if stream == "stdout" and code == 0:
                assert done.returncode == 1
                assert (
                    done.stderr == "error: the output cannot be written: No space left on device\n"
                )
            else:
                assert done.returncode == code
