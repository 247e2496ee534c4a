"""Compiled kernels that last: a folder shared by all runs, and one of this process's own.

MLX compiles most of its CUDA kernels when they are first used, and writes each into the folder
``$MLX_PTX_CACHE_DIR``: ``NAME.ptx`` (the code), ``NAME.txt`` (names), ``NAME.cu`` (the source). On
a CPU it lets a compiler write libraries into ``$TMPDIR``. It writes them in place, notices no full
disk, and reads whatever it finds by the name of the kernel alone. So a rank that reads while
another writes, one that is killed while it writes, a full disk, or another GPU or compiler would
make a cache that fails from then on. Therefore MLX gets a folder that no other process uses, filled
with links to kernels that are whole. What it compiled is published at moments when MLX compiles
nothing, with its digest: a kernel that has changed since is removed, and compiled again. The shared
folder is named by the versions of MLX and of the compiler, and by the device.

On a Mac, most kernels come with MLX, and macOS keeps what Metal makes of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k2cli.files import private_folder, read_regular, write_atomically
from k2cli.pauses import Deadline
from k2cli.system.disk import disk_use

VARIABLE = "MLX_PTX_CACHE_DIR"
_LOCK_SECONDS = 5.0
_PROCESSES = "processes"
_DIGEST = ".sha256"
# Less than this left means that files may have been cut.
_ROOM_BYTES = 16 * 2**20
_ELF = struct.Struct("<32xQQ6xHHHH")  # offsets of two tables, and the sizes and counts of entries
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Files:
    """Files of a kernel: that of its code, which MLX looks for, and others that come with it."""

    code: str
    others: tuple[str, ...] = ()

    @property
    def in_order(self) -> tuple[str, ...]:
        """All suffixes, the code last: MLX takes a kernel whose code is there for complete."""
        return (*self.others, self.code)


CUDA = Files(".ptx", (".cu", ".txt"))
CPU = Files(".so")


class KernelCache:
    """The kernels of one process. ``folder`` is for MLX, ``shared`` for all processes of the user.

    Args:
        parent: the folder of all caches; only this user can access it.
        key: versions and device for which the kernels were compiled.
        files: what MLX writes for a kernel.

    Raises:
        OSError: if the folders cannot be made, written or locked.
    """

    def __init__(self, parent: Path, key: str, files: Files = CUDA) -> None:
        self.shared = private_folder(parent / key)
        self._files = files
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
        """Link the kernels of the shared folder into the process's own; return their paths.

        One whose digest is another than when it was published is removed.
        """
        good = set()
        for kernel in _kernels(self.shared, self._files):
            with contextlib.suppress(OSError):
                if _digest(self.shared, kernel, self._files) != _read_digest(self.shared, kernel):
                    for suffix in (self._files.code, *self._files.others, _DIGEST):
                        (self.shared / _with(kernel, suffix)).unlink(missing_ok=True)
                    continue
                for suffix in self._files.in_order:
                    _place(self.shared / _with(kernel, suffix), self.folder / _with(kernel, suffix))
                good.add(kernel)
        return good

    def publish(self) -> int:
        """Share what MLX has compiled; call this only while MLX compiles nothing.

        Returns:
            The number of kernels that are new.
        """
        # The kernels of long names are in folders within it.
        folders = [self.folder, *(each for each in self.folder.rglob("*") if each.is_dir())]
        change = max(folder.stat().st_mtime_ns for folder in folders)
        # A shared folder that the user has removed is made by the next start, for this user alone.
        if change == self._seen_change or not self.shared.is_dir():
            return 0
        if not _has_room(self.shared):  # MLX takes no notice of a full disk
            return 0
        fresh = {
            kernel
            for kernel in _kernels(self.folder, self._files) - self._published
            if _is_whole(self.folder, kernel, self._files)
        }
        for kernel in fresh:
            _write_digest(self.shared, kernel, _digest(self.folder, kernel, self._files))
            for suffix in self._files.in_order:
                _place(self.folder / _with(kernel, suffix), self.shared / _with(kernel, suffix))
        self._published |= fresh
        self._seen_change = change
        return len(fresh)

    def close(self) -> None:
        """Remove the process's own folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def open_kernel_cache(own: Path) -> KernelCache | None:
    """Make MLX keep the kernels that it compiles; None on Metal, or without a shared folder.

    Call this before MLX's first kernel: MLX reads the variable once.

    Args:
        own: a folder of this rank alone, which is used without a shared one. Two ranks must not
            compile in the same folder.
    """
    import mlx.core as mx

    if mx.metal.is_available():
        return None
    on_cuda = mx.cuda.is_available()
    version = getattr(mx, "__version__", "unknown")
    if on_cuda:
        architecture = mx.device_info().get("architecture", "") or "unknown"
        key = f"mlx-{version}-cuda-{_compiler_version()}-{architecture}"
    else:
        # A home folder may be shared by systems with other libraries.
        key = f"mlx-{version}-cpu-{'-'.join(filter(None, platform.libc_ver())) or 'unknown'}"
    cache = None
    with contextlib.suppress(OSError):
        # The guard has made this folder, for this user alone.
        parent = private_folder(Path(tempfile.gettempdir()) / ("ptx" if on_cuda else "cpu"))
        cache = KernelCache(parent, _NOT_IN_NAMES.sub("-", key), CUDA if on_cuda else CPU)
    with contextlib.suppress(OSError):
        os.environ[VARIABLE if on_cuda else "TMPDIR"] = str(cache.folder if cache else _empty(own))
    return cache


def _empty(folder: Path) -> Path:
    """Make a folder without what an earlier attempt of the run may have left half written."""
    shutil.rmtree(folder, ignore_errors=True)
    return private_folder(folder)


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


def _kernels(folder: Path, files: Files) -> set[Path]:
    """List the kernels below a folder, by the paths of their code without suffix.

    Long names are folders within folders (``get_ptx_path`` in MLX's ``jit_module.cpp``).
    """
    return {
        code.relative_to(folder).with_name(code.name.removesuffix(files.code))
        for code in folder.rglob(f"*{files.code}")
    }


def _is_whole(folder: Path, kernel: Path, files: Files) -> bool:
    """True if all files of a kernel are there, and none was cut by a full disk.

    Their order helps: what is written after a file that was cut is empty.
    """
    try:
        for suffix in files.others:
            if not (folder / _with(kernel, suffix)).stat().st_size:
                return False
        return _is_complete((folder / _with(kernel, files.code)).read_bytes())
    except OSError:
        return False


def _is_complete(code: bytes) -> bool:
    """True for code that is not empty; a file of the format ELF must contain its tables."""
    if not code.startswith(b"\x7fELF\x02\x01"):
        return bool(code)
    if len(code) < 64:
        return False
    numbers: tuple[int, ...] = _ELF.unpack_from(code)
    programs, sections, program_size, program_count, section_size, section_count = numbers
    ends = programs + program_size * program_count, sections + section_size * section_count
    return len(code) >= max(ends)


def _digest(folder: Path, kernel: Path, files: Files) -> str:
    digest = hashlib.sha256()
    for suffix in files.in_order:
        data = (folder / _with(kernel, suffix)).read_bytes()
        digest.update(b"%d " % len(data) + data)
    return digest.hexdigest()


def _read_digest(folder: Path, kernel: Path) -> str:
    try:
        return read_regular(folder / _with(kernel, _DIGEST), 100).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _write_digest(folder: Path, kernel: Path, digest: str) -> None:
    path = folder / _with(kernel, _DIGEST)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, digest)


def _has_room(folder: Path) -> bool:
    return disk_use(folder).free >= _ROOM_BYTES


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
