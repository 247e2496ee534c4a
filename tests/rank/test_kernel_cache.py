"""CUDA kernels that MLX has compiled: shared when they are whole, and never while MLX writes.

MLX's part (``read_cached_ptx`` and ``write_cached_ptx`` of its ``jit_module.cpp``) is played here,
because there is no GPU: by name, in place, the code first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2cli.rank import kernel_cache
from k2cli.rank.kernel_cache import VARIABLE, KernelCache

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
        "from k2cli.rank.kernel_cache import KernelCache\n"
        "from tests.rank.test_kernel_cache import KEY, _compile\n"
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


def test_on_cuda_mlx_is_told_where_and_elsewhere_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlx.core as mx

    monkeypatch.setenv(VARIABLE, "/tmp/of-somebody-else")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert kernel_cache.open_kernel_cache() is None
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    monkeypatch.setattr(kernel_cache, "_compiler_version", lambda: "13.0")
    cache = kernel_cache.open_kernel_cache()
    assert cache is not None
    assert Path(os.environ[VARIABLE]) == cache.folder
    assert cache.shared.name == f"mlx-{mx.__version__}-cuda-13.0-sm_90"  # type: ignore[attr-defined]
    assert tmp_path / "ptx" in cache.folder.parents
    assert cache.folder.stat().st_mode & 0o777 == 0o700
