"""Folders and links that another user plants where a run keeps MPI's sockets and files."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from k2cli import scratch
from k2cli.agent.openmpi import find_mpirun
from k2cli.errors import ClusterError
from k2cli.launch.mpi import prepare_mpirun
from k2cli.launch.mpi_remote import daemon_command
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.nodes.local import LocalNode
from k2cli.scratch import check_private, find_scratch, make_scratch, remove_scratch
from tests.support.harness import supervised, wait_until

BASES = [Path(base) for base in ("/dev/shm", "/tmp") if Path(base).is_dir()]
NOBODY = 65534
TOKEN = "0123456789"


@pytest.fixture
def run_id() -> Iterator[str]:
    name = f"hostile-{secrets.token_hex(4)}"
    yield name
    remove_scratch(name)
    for base in BASES:
        for path in base.glob(f"k2-{name}*"):
            subprocess.run(["rm", "-rf", path], check=True)


def test_a_run_s_folder_is_private_and_its_name_is_not_the_run_s(run_id: str) -> None:
    paths = [make_scratch(run_id) for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o700
        assert path.name.startswith(f"k2-{run_id}.")
        assert len(str(path / "mpi-slot-10")) < 100  # the limit of a socket's path is 104 or 108
    assert set(find_scratch(run_id)) == set(paths)
    assert remove_scratch(run_id)
    assert not any(path.exists() for path in paths)


def test_a_name_that_was_guessed_is_not_used(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = BASES[0] / f"k2-{run_id}.{TOKEN}"
    planted.symlink_to(tmp_path)
    tokens = iter([TOKEN, "abcdefabcd"])
    monkeypatch.setattr(scratch.secrets, "token_hex", lambda count: next(tokens))
    made = make_scratch(run_id)
    assert made.name.endswith(".abcdefabcd")
    assert find_scratch(run_id) == [made]
    remove_scratch(run_id)
    assert planted.is_symlink()
    assert tmp_path.is_dir()


def test_folders_that_others_could_write_are_neither_found_nor_removed(
    run_id: str, tmp_path: Path
) -> None:
    (tmp_path / "kept").touch()
    link, open_to_all, file, foreign, old = (
        BASES[0] / f"k2-{run_id}{ending}"
        for ending in (".0000000000", ".1111111111", ".2222222222", ".3333333333", "")
    )
    link.symlink_to(tmp_path)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    file.touch()
    old.symlink_to(tmp_path)
    planted = [link, open_to_all, file]
    if os.geteuid() == 0:
        foreign.mkdir()
        (foreign / "theirs").touch()
        os.chown(foreign, NOBODY, NOBODY)
        planted.append(foreign)
    for path in planted:
        with pytest.raises(ClusterError):
            check_private(path)
    assert find_scratch(run_id) == []
    remove_scratch(run_id)
    assert (tmp_path / "kept").exists()
    assert link.is_symlink()
    assert old.is_symlink()
    if os.geteuid() == 0:
        assert (foreign / "theirs").exists()


def test_the_folder_of_a_run_of_the_previous_version_is_removed(run_id: str) -> None:
    old = BASES[0] / f"k2-{run_id}"
    old.mkdir(mode=0o700)
    (old / "mpi-slot-0").touch()
    assert remove_scratch(run_id)
    assert not old.exists()
    assert not remove_scratch(run_id)


def test_no_folder_is_made_where_users_can_replace_those_of_others(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "tmp"
    base.mkdir()
    base.chmod(0o777)
    monkeypatch.setattr(scratch, "_BASES", (str(base),))
    with pytest.raises(ClusterError, match="sticky bit") as caught:
        make_scratch(run_id)
    assert caught.value.hint == f"sudo chmod 1777 {base}"
    base.chmod(0o1777)
    assert make_scratch(run_id).parent == base


class Far(LocalNode):
    """A node that only its name makes another machine."""

    name = "far"
    is_local = False


def test_mpirun_s_programs_are_in_private_folders_on_both_machines(
    run_id: str, tmp_path: Path
) -> None:
    if find_mpirun() is None:
        pytest.skip("needs mpirun")
    for base in BASES:
        (base / f"k2-{run_id}").symlink_to(tmp_path)
    nodes: Sequence[Any] = [LocalNode(), Far()]
    mpirun = prepare_mpirun(run_id, nodes, prefixes={"": "/opt/a", "far": "/opt/a"})
    first, _ = mpirun.environment["PATH"].split(os.pathsep, 1)
    check_private(Path(first))
    assert stat.S_IMODE((Path(first) / "ssh").lstat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []
    (theirs,) = set(find_scratch(run_id)) - {Path(first)}
    folders = {"": first, "far": str(theirs)}
    told = daemon_command([*mpirun.command.arguments], "far", {}, folders)
    assert first not in told
    assert str(theirs) in told


@contextmanager
def planting(run_id: str, victim: Path) -> Iterator[list[Path]]:
    """Take the name that a run's folder had before as soon as it is free, as another user can."""
    planted: list[Path] = []
    over = threading.Event()

    def plant() -> None:
        path = BASES[0] / f"k2-{run_id}"
        while not over.wait(0.001):
            with suppress(FileExistsError):
                path.symlink_to(victim)
                planted.append(path)
                return

    thread = threading.Thread(target=plant)
    thread.start()
    try:
        yield planted
    finally:
        over.set()
        thread.join()
        for path in planted:
            path.unlink(missing_ok=True)


@pytest.mark.ranks
def test_a_planted_link_neither_ends_a_run_nor_is_written_through(tmp_path: Path) -> None:
    policy = RestartPolicy("on-failure", first_delay_seconds=0.5)
    with supervised("mpi", restart=policy) as run, planting(run.run_id, tmp_path) as planted:
        run.wait_ready()
        before = find_scratch(run.run_id)
        os.kill(run.pid_of("rank-1"), signal.SIGKILL)
        wait_until(lambda: len(run.record.attempts) == 1, 30, "the failure")
        assert run.wait_ready().state == "ready"
        assert planted
        assert not set(before) & set(find_scratch(run.run_id))
        run.supervisor.terminate()
        assert run.supervisor.wait(20) == 0
        assert find_scratch(run.run_id) == []
        assert planted[0].is_symlink()
    assert list(tmp_path.iterdir()) == []
