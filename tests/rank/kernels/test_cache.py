"""CUDA kernels that MLX has compiled: shared when they are whole, and never while MLX writes.

MLX's part (``read_cached_ptx`` and ``write_cached_ptx`` of its ``jit_module.cpp``) is played here,
because there is no GPU: by name, in place, the code first.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k2cli.rank.kernels import cache as kernels
from k2cli.rank.kernels.cache import VARIABLE, KernelCache

KEY = "mlx-0.32.4-cuda-13.0-sm_90"
LONG = "a" * 245 + "/" + "b" * 30


def _compile(folder: Path, name: str, *, killed: bool = False) -> None:
    """Write a kernel as MLX does; ``killed`` in the middle."""
    code = folder / f"{name}.ptx"
    code.parent.mkdir(parents=True, exist_ok=True)
    code.write_text("code of" if killed else f"code of {name}")
    if not killed:
        (folder / f"{name}.txt").write_text(f"kernel\t{name}\n")
        (folder / f"{name}.cu").write_text("source")


def _known(folder: Path) -> dict[str, str]:
    return {
        str(code.relative_to(folder).with_suffix("")): code.read_text()
        for code in folder.rglob("*.ptx")
    }


def test_what_one_process_compiled_the_next_one_has(tmp_path: Path) -> None:
    first = KernelCache(tmp_path, KEY)
    for name in ("qmm_sm90", LONG):
        _compile(first.folder, name)
    assert first.publish() == 2
    assert first.publish() == 0
    first.close()
    second = KernelCache(tmp_path, KEY)
    assert _known(second.folder) == {name: f"code of {name}" for name in ("qmm_sm90", LONG)}
    assert (second.folder / "qmm_sm90.txt").read_text() == "kernel\tqmm_sm90\n"
    other_gpu = KernelCache(tmp_path, KEY.replace("90", "120"))
    assert _known(other_gpu.folder) == {}


def test_two_processes_that_compile_the_same_do_not_disturb_each_other(tmp_path: Path) -> None:
    caches = [KernelCache(tmp_path, KEY) for _ in range(2)]
    assert caches[0].folder != caches[1].folder
    for cache in caches:
        _compile(cache.folder, "same")
        _compile(cache.folder, f"own-{caches.index(cache)}")
    assert [cache.publish() for cache in caches] == [2, 2]
    assert set(_known(caches[0].shared)) == {"same", "own-0", "own-1"}
    assert not [file for file in caches[0].shared.iterdir() if file.name.startswith(".")]
    assert caches[1].publish() == 0


def test_a_process_that_is_killed_while_it_compiles_leaves_nothing_behind(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from k2cli.rank.kernels.cache import KernelCache\n"
        "from tests.rank.kernels.test_cache import KEY, _compile\n"
        "cache = KernelCache(Path(sys.argv[1]), KEY); _compile(cache.folder, 'whole')\n"
        "cache.publish(); _compile(cache.folder, 'half', killed=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    alive = KernelCache(tmp_path, KEY)
    assert set(_known(alive.folder)) == {"whole"}
    assert [folder.name for folder in (tmp_path / "processes").iterdir()] == [alive.folder.name]


def test_the_folder_of_a_living_process_is_not_removed(tmp_path: Path) -> None:
    living = KernelCache(tmp_path, KEY)
    _compile(living.folder, "one")
    KernelCache(tmp_path, KEY)
    assert set(_known(living.folder)) == {"one"}


@pytest.mark.parametrize("name", [KEY, "processes"])
def test_a_folder_that_others_can_access_is_not_used(tmp_path: Path, name: str) -> None:
    KernelCache(tmp_path, KEY).close()
    (tmp_path / name).chmod(0o777)
    with pytest.raises(OSError, match="only this user"):
        KernelCache(tmp_path, KEY)


def test_a_kernel_that_a_full_disk_has_cut_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX goes on after failed writes: the first file is cut, and those after it are empty."""
    cache = KernelCache(tmp_path, KEY)
    _compile(cache.folder, "cut")
    for suffix in (".txt", ".cu"):
        (cache.folder / f"cut{suffix}").write_text("")
    elf = Path(sys.executable).resolve().read_bytes()
    for name, code in (("cut-elf", elf[:-100]), ("whole-elf", elf), ("empty", b"")):
        _compile(cache.folder, name)
        (cache.folder / f"{name}.ptx").write_bytes(code)
    assert cache.publish() == 1
    _compile(cache.folder, "later")
    monkeypatch.setattr(kernels, "_has_room", lambda folder: False)
    assert cache.publish() == 0
    shared = {code.stem for code in cache.shared.glob("*.ptx")}
    assert shared == {"whole-elf"}
    monkeypatch.undo()
    assert cache.publish() == 1


@pytest.mark.parametrize("suffix", [".ptx", ".txt", ".sha256"])
def test_a_shared_kernel_that_has_changed_is_compiled_again(tmp_path: Path, suffix: str) -> None:
    first = KernelCache(tmp_path, KEY)
    for name in ("good", "damaged"):
        _compile(first.folder, name)
    first.publish()
    first.close()
    damaged = first.shared / f"damaged{suffix}"
    damaged.write_bytes(bytes(damaged.stat().st_size))  # pages that a power failure has lost
    second = KernelCache(tmp_path, KEY)
    assert set(_known(second.folder)) == {"good"}
    _compile(second.folder, "damaged")
    assert second.publish() == 1
    assert set(_known(KernelCache(tmp_path, KEY).folder)) == {"good", "damaged"}


def test_folders_that_the_user_removes_are_not_made_again_for_others(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "ptx", KEY)
    shutil.rmtree(cache.shared)
    _compile(cache.folder, "one")
    assert cache.publish() == 0
    again = KernelCache(tmp_path / "ptx", KEY)
    _compile(again.folder, "one")
    assert again.publish() == 1


def _as_on_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import mlx.core as mx

    monkeypatch.setenv(VARIABLE, "/tmp/of-somebody-else")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    monkeypatch.setattr(kernels, "_compiler_version", lambda: "13.0")


def test_on_cuda_mlx_is_told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mlx.core as mx

    _as_on_cuda(monkeypatch, tmp_path)
    cache = kernels.open_kernel_cache(tmp_path / "own")
    assert cache is not None
    assert Path(os.environ[VARIABLE]) == cache.folder
    assert cache.shared.name == f"mlx-{mx.__version__}-cuda-13.0-sm_90"  # type: ignore[attr-defined]
    assert tmp_path / "ptx" in cache.folder.parents
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_without_locks_each_rank_compiles_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # as over NFS without its lock service

    _as_on_cuda(monkeypatch, tmp_path)
    monkeypatch.setattr(kernels.fcntl, "flock", no_locks)
    own = tmp_path / "run" / "kernels-1"
    own.mkdir(parents=True)
    _compile(own, "of-an-earlier-attempt", killed=True)
    assert kernels.open_kernel_cache(own) is None
    assert os.environ[VARIABLE] == str(own)
    assert list(own.iterdir()) == []
    assert own.stat().st_mode & 0o777 == 0o700


_COMPILES_ON_A_CPU = (
    "import sys; from pathlib import Path\n"
    "from k2cli.rank.kernels.cache import open_kernel_cache\n"
    "import mlx.core as mx\n"
    "cache = open_kernel_cache(Path(sys.argv[1]))\n"
    "mx.eval(mx.compile(lambda x: mx.exp(x * 2.5) + mx.sigmoid(x))(mx.ones((3, 5))))\n"
    "print(cache.publish(), cache.shared); cache.close()\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="MLX computes on the CPU here")
def test_on_a_cpu_a_damaged_library_does_not_end_every_later_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("MLX compiles nothing without g++")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def compile_in_a_process() -> tuple[int, Path]:
        arguments = [sys.executable, "-c", _COMPILES_ON_A_CPU, str(tmp_path / "own")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        count, _, folder = done.stdout.strip().partition(" ")
        return int(count), Path(folder)

    count, shared = compile_in_a_process()
    assert count == 1
    assert compile_in_a_process() == (0, shared)
    (library,) = shared.rglob("*.so")
    library.write_bytes(library.read_bytes()[:5000])
    assert compile_in_a_process() == (1, shared)
