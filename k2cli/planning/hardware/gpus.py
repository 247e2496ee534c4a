"""The NVIDIA GPUs of a machine: their memory, who uses it, and which rank gets which of them.

MLX tells which GPUs a process may use: the driver has applied ``CUDA_VISIBLE_DEVICES`` by then, in
whatever form the user wrote it. ``nvidia-smi`` adds what MLX does not tell: the number under which
the user knows a GPU, its modes, and the processes on it. The two are joined by UUID, because CUDA
may count GPUs in another order than ``nvidia-smi``.
"""

from __future__ import annotations

import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from k2cli.gpu_name import GpuName
from k2cli.pauses import Deadline
from k2cli.units import MB, MIB, clean_text, format_bytes, one_line, whole_number

CONTEXT_BYTES = 600 * MB
"""Memory that the driver takes in each process that computes, beside MLX's arrays: the CUDA context
and loaded kernels (0.5 to 0.6 GB on an H200). MLX does not count it, and neither do plans: it is
taken from the limit."""

QUERY_FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.free", "memory.reserved", "compute_mode",
    "mig.mode.current",
)  # fmt: skip
QUERY = ("nvidia-smi", f"--query-gpu={','.join(QUERY_FIELDS)}", "--format=csv,noheader,nounits")
ONE_PROCESS = "it takes one process only"
_NOT_FIRST = (
    "nvidia-smi does not list it, and only the first of such devices can be used; choose one "
    "with CUDA_VISIBLE_DEVICES"
)
QUERY_PROCESSES = (
    "nvidia-smi",
    "--query-compute-apps=gpu_uuid,pid,used_memory,process_name",
    "--format=csv,noheader,nounits",
)
_PLACES = ("/usr/bin/nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi")
_QUERY_SECONDS = 8.0
"""Time limit of a call; two have to fit into a question to a node. Without persistence mode the
driver starts anew for each, which takes seconds on a host with many GPUs."""
_END_SECONDS = 0.5
_MOST_BYTES = 2**20
_UNIFIED = ("[N/A]", "N/A", "[Not Supported]")
_USED_BYTES = 64 * MIB
"""With less than this in use besides the driver's own, no other process is looked for."""


@dataclass(frozen=True, slots=True)
class GpuUser:
    """A process that uses a GPU; ``used_bytes`` is None if the driver does not tell."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that MLX can use, in bytes.

    ``limit_bytes`` is what a single rank's arrays may take: the free memory, without the CUDA
    context. ``free_bytes`` is None where it was not asked (a saved description of a cluster).
    ``obstacle`` is the reason if k2 does not choose it. ``exclusive``: it takes one process only.
    ``held_by`` are the runs of k2 that hold it, with ``claimed_bytes`` by their plans.
    """

    name: GpuName
    memory_bytes: int
    limit_bytes: int
    free_bytes: int | None = None
    obstacle: str = ""
    users: tuple[GpuUser, ...] = ()
    held_by: tuple[str, ...] = ()
    claimed_bytes: int = 0
    exclusive: bool = False

    @property
    def idle_limit_bytes(self) -> int:
        """The limit of a rank while nothing else uses the GPU."""
        return max(self.memory_bytes - CONTEXT_BYTES, 0)

    def lasting(self) -> Gpu:
        """Return the GPU without its present use, for a description that is kept."""
        return Gpu(
            self.name,
            self.memory_bytes,
            self.idle_limit_bytes,
            obstacle=self.obstacle,
            exclusive=self.exclusive,
        )


@dataclass(frozen=True, slots=True)
class ListedGpu:
    """A line of ``nvidia-smi``. Memory is None where the driver has none to report.

    ``unified``: the GPU shares the machine's memory (DGX Spark).
    """

    name: GpuName
    memory_bytes: int | None
    free_bytes: int | None
    compute_mode: str = ""
    mig: bool = False
    unified: bool = False

    @property
    def exclusive(self) -> bool:
        return self.compute_mode.startswith("Exclusive")


# --- nvidia-smi -----------------------------------------------------------------------------------


def parse_gpus(text: str) -> list[ListedGpu]:
    """Read the answer to ``QUERY``; lines in another form are left out."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY_FIELDS) or (number := whole_number(cells[0])) is None:
            continue
        _, uuid, name, total, free, reserved, mode, mig = cells
        memory = _mib(total)
        if memory is not None:
            memory = max(memory - (_mib(reserved) or 0), 0)
        listed = GpuName(number, one_line(uuid), one_line(name))
        unified = total in _UNIFIED
        found.append(ListedGpu(listed, memory, _mib(free), mode, mig == "Enabled", unified))
    return found


def parse_processes(text: str) -> dict[str, tuple[GpuUser, ...]]:
    """Read the answer to ``QUERY_PROCESSES``: the processes on each GPU, by its UUID."""
    found: dict[str, list[GpuUser]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",", 3)]
        if len(cells) == 4 and (pid := whole_number(cells[1])) is not None:
            name = clean_text(cells[3].rpartition("/")[2], keep="")
            found.setdefault(cells[0], []).append(GpuUser(pid, name, _mib(cells[2])))
    return {uuid: tuple(users) for uuid, users in found.items()}


def _mib(cell: str) -> int | None:
    number = whole_number(cell)
    return None if number is None else number * MIB


def list_gpus() -> list[ListedGpu]:
    """Ask nvidia-smi for the GPUs of this machine; none if it is missing or fails."""
    return parse_gpus(_ask(QUERY))


def _ask(query: Sequence[str]) -> str:
    program = shutil.which(query[0]) or next(filter(shutil.which, _PLACES), None)
    if program is None:
        return ""
    try:
        output = _output_of([program, *query[1:]])
    except OSError:
        return ""
    return (output or b"").decode(errors="replace")


def _output_of(arguments: Sequence[str]) -> bytes | None:
    """Run a program; None if it fails, or takes too long or prints too much.

    It is not waited for after that: with a broken driver nvidia-smi cannot even be killed.
    """
    limit = Deadline(_QUERY_SECONDS)
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    assert process.stdout is not None
    output = b""
    try:
        with process.stdout as pipe:
            while len(output) <= _MOST_BYTES and not limit.has_passed:
                if select.select([pipe], [], [], limit.next_wait())[0]:
                    piece = pipe.read(2**16)
                    if not piece:
                        break
                    output += piece
                elif process.poll() is not None:
                    break  # a process that it has started keeps the pipe open
        status = process.wait(max(limit.left_seconds, _END_SECONDS))
        return output if status == 0 and len(output) <= _MOST_BYTES else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)


# --- what MLX may use -----------------------------------------------------------------------------


def usable_gpus(devices: Sequence[Mapping[str, Any]], shared_limit: int | None) -> tuple[Gpu, ...]:
    """Describe the GPUs of MLX's ``device_info``, with what nvidia-smi knows of them.

    Args:
        devices: one entry per GPU that this process may use, in CUDA's order.
        shared_limit: what a GPU that shares the machine's memory may use of it.
    """
    listed = {each.name.uuid: each for each in list_gpus()}
    seen = [_described(order, info, listed, shared_limit) for order, info in enumerate(devices)]
    if not any(_is_used(gpu) for gpu in seen):
        return tuple(seen)
    users = parse_processes(_ask(QUERY_PROCESSES))
    return tuple(
        _refused_if_exclusive(replace(gpu, users=users.get(gpu.name.uuid, ()))) for gpu in seen
    )


def _described(
    order: int,
    info: Mapping[str, Any],
    listed: Mapping[str, ListedGpu],
    shared_limit: int | None,
) -> Gpu:
    uuid = str(info.get("uuid", ""))
    smi = listed.get(uuid)
    model = one_line(str(info.get("device_name", "")))
    total = int(info.get("total_memory", 0))
    free = int(info["free_memory"]) if "free_memory" in info else None
    if smi is None:
        # Without nvidia-smi its UUID is CUDA's own. A UUID that nvidia-smi does not know is that of
        # a MIG slice, which only its user can choose. A rank then computes on CUDA's first device.
        name = GpuName(order, "" if listed else uuid, model)
        found = _with_limit(name, total, free)
        return found if name.uuid or order == 0 else replace(found, obstacle=_NOT_FIRST)
    if smi.memory_bytes is None and not smi.unified:  # the driver reports an error instead
        smi = replace(smi, memory_bytes=total, free_bytes=free)
    return gpu_of(smi, total, shared_limit)


def gpu_of(listed: ListedGpu, total: int = 0, shared_limit: int | None = None) -> Gpu:
    """Describe a GPU of nvidia-smi; ``total`` is used if it has no memory of its own."""
    if listed.memory_bytes is None:
        limit = total if shared_limit is None else min(total, shared_limit)
        limit = max(limit - CONTEXT_BYTES, 0)
        found = Gpu(listed.name, total, limit)
    else:
        found = _with_limit(listed.name, listed.memory_bytes, listed.free_bytes)
    return replace(found, obstacle=_obstacle(listed), exclusive=listed.exclusive)


def _with_limit(name: GpuName, memory: int, free: int | None) -> Gpu:
    left = memory if free is None else min(memory, free)
    return Gpu(name, memory, max(left - CONTEXT_BYTES, 0), free)


def _obstacle(listed: ListedGpu) -> str:
    if listed.mig:
        return "it is divided into MIG slices; choose one with CUDA_VISIBLE_DEVICES=MIG-UUID"
    return "its compute mode is Prohibited" if listed.compute_mode == "Prohibited" else ""


def _is_used(gpu: Gpu) -> bool:
    return gpu.free_bytes is not None and gpu.memory_bytes - gpu.free_bytes > _USED_BYTES


def _refused_if_exclusive(gpu: Gpu) -> Gpu:
    """Add the obstacle of a GPU that takes one process only and has one."""
    if not gpu.exclusive or not gpu.users or gpu.obstacle:
        return gpu
    return replace(gpu, obstacle=f"{ONE_PROCESS}, and {describe_users(gpu)} uses it")


def describe_users(gpu: Gpu, most: int = 3) -> str:
    """Name the processes that use a GPU, the biggest first: ``python (1234) 61.2 GB``."""
    biggest = sorted(gpu.users, key=lambda user: -(user.used_bytes or 0))
    named = [
        f"{user.name} ({user.pid})"
        + (f" {format_bytes(user.used_bytes)}" if user.used_bytes is not None else "")
        for user in biggest[:most]
    ]
    return ", ".join(named)


# --- choice ---------------------------------------------------------------------------------------


def by_preference(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the GPUs that k2 may choose, those with the most memory for a rank first.

    Differences of less than a sixteenth do not count, so that idle GPUs keep their order.
    """
    largest = max((gpu.memory_bytes for gpu in gpus), default=0)
    step = max(largest // 16, 1)
    usable = [gpu for gpu in gpus if not gpu.obstacle]
    return sorted(usable, key=lambda gpu: (-(gpu.limit_bytes // step), gpu.name.index))


def gpus_for_ranks(gpus: Sequence[Gpu], ranks: int, most: int | None = None) -> list[Gpu]:
    """Choose a GPU for each rank of a machine: one each, as far as there are enough.

    A GPU that takes one process only is not shared, as far as the others suffice.

    Args:
        gpus: those of the machine.
        ranks: number of ranks on the machine.
        most: use at most so many GPUs, though there are more.
    """
    usable = by_preference(gpus)
    chosen = usable[: min(ranks, most or ranks)]
    shared = [gpu for gpu in chosen if not gpu.exclusive]
    if len(chosen) < ranks and not shared:
        chosen = usable[:ranks]
        shared = [gpu for gpu in chosen if not gpu.exclusive] or chosen
    more = [shared[rank % len(shared)] for rank in range(ranks - len(chosen))] if shared else []
    return [*chosen, *more]
