"""Compiled CUDA kernels that last: a folder shared by all runs, and one of this process's own.

MLX compiles most of its CUDA kernels when they are first used, and writes each into the folder
``$MLX_PTX_CACHE_DIR``: ``NAME.ptx`` (the code), ``NAME.txt`` (names), ``NAME.cu`` (the source). It
writes them in place, and reads whatever it finds by the name of the kernel alone. So a rank that
reads while another writes, one that is killed while it writes, or another GPU or compiler would
make a cache that fails from then on. Therefore MLX gets a folder that no other process uses, filled
with links to kernels that are whole. What it compiled is published at moments when MLX compiles
nothing. The shared folder is named by the versions of MLX and of the compiler, and by the GPU.

On a CPU MLX does this by itself in ``TMPDIR``, which the guard sets. On a Mac, most kernels come
with MLX, and macOS keeps what Metal makes of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from k2cli.files import private_folder
from k2cli.pauses import Deadline

VARIABLE = "MLX_PTX_CACHE_DIR"
_LOCK_SECONDS = 5.0
_PROCESSES = "processes"
_CODE, _NAMES, _SOURCE = ".ptx", ".txt", ".cu"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class KernelCache:
    """The kernels of one process. ``folder`` is for MLX, ``shared`` for all processes of the user.

    Args:
        parent: the folder of all caches; only this user can access it.
        key: versions and device for which the kernels were compiled.

    Raises:
        OSError: if the folders cannot be made or written.
    """

    def __init__(self, parent: Path, key: str) -> None:
        self.shared = private_folder(parent / key)
        processes = private_folder(parent / _PROCESSES)
        with _locked(processes):
            _remove_left_over(processes)
            self.folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=processes))
            # Held as long as the process lives: by this others know that the folder is in use.
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._published = self._fill()
        self._seen_change = 0

    def _fill(self) -> set[Path]:
        """Link the kernels of the shared folder into the process's own; return their paths."""
        complete = _kernels(self.shared)
        for kernel in complete:
            for suffix in (_NAMES, _SOURCE, _CODE):
                with contextlib.suppress(FileNotFoundError):
                    _place(self.shared / _with(kernel, suffix), self.folder / _with(kernel, suffix))
        return complete

    def publish(self) -> int:
        """Share what MLX has compiled; call this only while MLX compiles nothing.

        Returns:
            The number of kernels that are new.
        """
        # The kernels of long names are in folders within it.
        folders = [self.folder, *(each for each in self.folder.rglob("*") if each.is_dir())]
        change = max(folder.stat().st_mtime_ns for folder in folders)
        if change == self._seen_change:
            return 0
        fresh = _kernels(self.folder) - self._published
        for kernel in fresh:
            # The code comes last: MLX takes a kernel whose code is there for complete.
            for suffix in (_SOURCE, _NAMES, _CODE):
                _place(self.folder / _with(kernel, suffix), self.shared / _with(kernel, suffix))
        self._published |= fresh
        self._seen_change = change
        return len(fresh)

    def close(self) -> None:
        """Remove the process's own folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def open_kernel_cache() -> KernelCache | None:
    """Make MLX keep the CUDA kernels that it compiles; None on other devices, or without a folder.

    Call this before MLX's first kernel: MLX reads the variable once.
    """
    import mlx.core as mx

    if not mx.cuda.is_available():
        return None
    architecture = mx.device_info().get("architecture", "")
    version = getattr(mx, "__version__", "unknown")
    key = f"mlx-{version}-cuda-{_compiler_version()}-{architecture or 'unknown'}"
    try:
        # The guard has made this folder, for this user alone.
        parent = private_folder(Path(tempfile.gettempdir()) / "ptx")
        cache = KernelCache(parent, _NOT_IN_NAMES.sub("-", key))
    except OSError:
        return None
    os.environ[VARIABLE] = str(cache.folder)
    return cache


def _compiler_version() -> str:
    """Return the version of NVRTC, the compiler that MLX has loaded; "unknown" if there is none."""
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "/libnvrtc.so" in path:
                major, minor = ctypes.c_int(), ctypes.c_int()
                ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
                return f"{major.value}.{minor.value}"
    except (OSError, AttributeError):
        pass
    return "unknown"


def _kernels(folder: Path) -> set[Path]:
    """List the kernels below a folder that are whole, by the paths of their code without suffix.

    Long names are folders within folders (``get_ptx_path`` in MLX's ``jit_module.cpp``).
    """
    return {
        code.relative_to(folder).with_name(code.name.removesuffix(_CODE))
        for code in folder.rglob(f"*{_CODE}")
        if code.with_name(code.name.removesuffix(_CODE) + _NAMES).exists()
    }


def _with(kernel: Path, suffix: str) -> Path:
    return kernel.with_name(kernel.name + suffix)


def _place(source: Path, target: Path) -> None:
    """Put a link to a file, or a copy, at ``target`` in one step."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = target.parent / f".{os.urandom(6).hex()}"
    try:
        try:
            os.link(source, partial)
        except OSError:  # some file systems have no links
            shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # renaming a link onto the same file keeps both


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; processes hold it for moments only.

    Raises:
        OSError: if another process does not give it up in time.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    limit = Deadline(_LOCK_SECONDS)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if limit.has_passed:
                    raise
                time.sleep(limit.next_wait(0.05))
        yield
    finally:
        os.close(descriptor)


def _remove_left_over(processes: Path) -> None:
    """Remove the folders of processes that have ended; a kernel in them may be incomplete."""
    for folder in processes.iterdir():
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
