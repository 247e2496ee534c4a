"""MLX's compiled libraries: no folder that another user may have made is used for them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from k2cli.agent.run_folder import remove_bootstraps
from k2cli.guard.spawn import kernel_folder, spawn_rank
from k2cli.settings import runs_directory
from tests.support.bootstraps import make_assignment, make_bootstrap

RUN = "demo-1"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_lasts_across_runs_and_is_private(cache: Path) -> None:
    folder = kernel_folder(RUN)
    assert folder.parent == cache
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kernel_folder("demo-2") == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o500])
def test_a_folder_that_others_can_access_is_not_used(mode: int) -> None:
    if mode == 0o500 and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    kernel_folder(RUN).chmod(mode)
    folder = kernel_folder(RUN)
    assert folder.parent == runs_directory() / RUN
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_folder(RUN)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match="only this user"):
        kernel_folder(RUN)


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "no parent"])
def test_something_else_in_its_place_is_not_used(cache: Path, kind: str) -> None:
    name = kernel_folder(RUN).name
    (cache / name).rmdir()
    if kind == "link":
        (cache / "target").mkdir(mode=0o700)
        (cache / name).symlink_to(cache / "target")
    elif kind == "file":
        (cache / name).touch()
    elif kind == "fifo":
        os.mkfifo(cache / name)
    else:
        cache.rmdir()
        cache.touch()
    assert kernel_folder(RUN).parent == runs_directory() / RUN
    remove_bootstraps(RUN)
    assert not (runs_directory() / RUN).exists()


def test_a_user_without_a_home_folder_has_a_folder_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("K2_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert kernel_folder(RUN).parent == runs_directory() / RUN


def test_a_rank_gets_it_even_if_its_environment_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "show.py").write_text("import tempfile; print(tempfile.gettempdir())")
    bootstrap = make_bootstrap(make_assignment(run_id=RUN), environment={"TMPDIR": "/tmp"})

    async def output_of_the_rank() -> bytes:
        rank = await spawn_rank(bootstrap, "show", {"TMPDIR": "/tmp"})
        shown, _ = await rank.process.communicate()
        rank.connection.close()
        rank.page.close()
        return shown

    assert asyncio.run(output_of_the_rank()).decode().strip() == str(kernel_folder(RUN))
