"""Checks of each machine by itself: clock, memory, GPU limit, disk, sleep and power."""

from __future__ import annotations

from collections.abc import Iterable

from k2cli.agent.software import NETWORK_FILESYSTEMS, ProcessUse, Software
from k2cli.cluster.facts.machine import Examination, MachineFacts
from k2cli.doctor.results import CheckResult, Situation, on_node
from k2cli.units import GIB, MIB, format_bytes

CLOCK_SKEW_SECONDS = 2.0
"""A larger difference makes merged logs hard to read. Runs do not depend on equal clocks."""

MACOS_RESERVE_BYTES = 8 * GIB
"""Memory left to macOS when a higher GPU limit is suggested; machines with less have become
unresponsive (ml-explore/mlx#3186 reports a kernel panic at high limits)."""

SLOW_DISK_BYTES_PER_SECOND = 1_000_000_000
"""Internal SSDs of Apple silicon Macs read several GB/s; 300 GB at 1 GB/s take five minutes."""

FULL_DISK_BYTES = 100_000_000
"""A run writes its record, bootstrap files and a log."""


def clock(situation: Situation) -> Iterable[CheckResult]:
    """Check that clocks agree, within the error of a measurement over the network."""
    for node in situation.nodes:
        offset, error = node.condition.clock_offset_seconds, node.condition.clock_error_seconds
        if node.failure is not None or offset is None or error is None:
            continue
        ahead = "ahead" if offset > 0 else "behind"
        if abs(offset) - error > CLOCK_SKEW_SECONDS:
            mac = node.machine is not None and node.machine.os_name == "macos"
            command = "sudo sntp -sS time.apple.com" if mac else "sudo timedatectl set-ntp true"
            detail = f"{abs(offset):.1f} s {ahead} of the launching machine"
            yield CheckResult("warn", "clock", node.node, detail, on_node(node.node, command))
        else:
            detail = f"within {abs(offset) + error:.2f} s of the launching machine"
            yield CheckResult("pass", "clock", node.node, detail)


def leftovers(situation: Situation) -> Iterable[CheckResult]:
    """Check that no process of an ended run holds memory."""
    for node, software in situation.software.items():
        runs = sorted({use.run_id for use in software.processes if use.run_id is not None})
        for run in runs:
            held = _held(software, run)
            if run in situation.live_runs:
                yield CheckResult("warn", "runs", node, f"{run} holds {held}", f"k2 stop {run}")
            elif run in situation.ended_runs:
                detail = f"left over from {run}, which has ended: {held}"
                clean = f"k2 cluster clean --nodes {node}"
                yield CheckResult("fail", "leftovers", node, detail, clean)
            else:
                detail = f"{run}, which was not launched from here, holds {held}"
                hint = on_node(node, f"ps -o user,lstart,args -p {_pids(software, run)}")
                yield CheckResult("warn", "runs", node, detail, hint)
        if not runs:
            yield CheckResult("pass", "leftovers", node, "no process of a run")


def _pids(software: Software, run: str) -> str:
    return ",".join(str(use.pid) for use in software.processes if use.run_id == run)


def _held(software: Software, run: str) -> str:
    uses = [use for use in software.processes if use.run_id == run]
    held = format_bytes(sum(use.resident_bytes for use in uses))
    return f"{held} in {len(uses)} process(es): {', '.join(str(use.pid) for use in uses)}"


def memory(situation: Situation) -> Iterable[CheckResult]:
    """Check that the free memory is enough for the plan; otherwise name the biggest processes."""
    for node in situation.nodes:
        available = available_bytes(node)
        if node.machine is None or available is None:
            continue
        need = situation.needs.get(node.node)
        total = node.machine.memory_bytes
        detail = f"{format_bytes(available)} of {format_bytes(total)} free"
        if need is None or node.machine.backend == "cuda":  # the ranks' memory is the GPUs'
            yield CheckResult("pass", "memory", node.node, detail)
        elif available >= need.total_bytes:
            detail += f", the plan needs {format_bytes(need.total_bytes)}"
            yield CheckResult("pass", "memory", node.node, detail)
        else:
            missing = format_bytes(need.total_bytes - available)
            detail += f", the plan needs {format_bytes(need.total_bytes)}: {missing} too little"
            detail += _holders(node.software)
            hint = "close the programs named, or plan for less: k2 plan-memory MODEL --context N"
            yield CheckResult("fail", "memory", node.node, detail, hint)


def available_bytes(node: Examination) -> int | None:
    """Return the memory that a program could get at once."""
    found = [node.condition.available_bytes]
    if node.software is not None:
        found.append(node.software.available_bytes)
    known = [each for each in found if each is not None]
    # In a container the system reports the whole machine's memory.
    limit = node.machine.memory_bytes if node.machine is not None else None
    return min([*known, *([limit] if limit is not None else [])]) if known else None


def _holders(software: Software | None) -> str:
    uses = software.processes if software is not None else ()
    named = [f"{_called(use)} {format_bytes(use.resident_bytes)}" for use in uses[:4]]
    return f"; held by {', '.join(named)}" if named else ""


def _called(use: ProcessUse) -> str:
    return f"run {use.run_id} ({use.pid})" if use.run_id else f"{use.name} ({use.pid})"


def gpu_limit(situation: Situation) -> Iterable[CheckResult]:
    """Check that the memory that MLX may use is enough for the plan, or tell how to raise it."""
    for node, machine in situation.machines.items():
        need = situation.needs.get(node)
        if machine.backend == "cuda" and machine.gpus:
            continue  # see checks_gpu.memory
        limit = format_bytes(machine.limit_bytes)
        told = f"MLX may use {limit} ({machine.limit_mark}: {machine.limit_source})"
        if need is None or need.total_bytes <= machine.limit_bytes:
            yield CheckResult("pass", "GPU limit", node, told)
            continue
        detail = f"{told}, the plan needs {format_bytes(need.total_bytes)}"
        yield CheckResult(
            "fail", "GPU limit", node, detail, _raise_limit(node, machine, need.total_bytes)
        )


def _raise_limit(node: str, machine: MachineFacts, total: int) -> str:
    if machine.os_name != "macos":
        return "plan for less: k2 plan-memory MODEL --context N, or more nodes"
    if total > machine.memory_bytes - MACOS_RESERVE_BYTES:
        return "raising the limit would not leave macOS enough: plan for less, or more nodes"
    wanted = -(-total // MIB) + 1024
    command = on_node(node, f"sudo sysctl iogpu.wired_limit_mb={wanted}")
    return f"{command}  (until reboot; for good: docs/guide/doctor.md)"


def disk(situation: Situation) -> Iterable[CheckResult]:
    """Check that the models' volume has free space and is not on the network."""
    for node, software in situation.software.items():
        volume = software.volume
        if volume is None:
            continue
        free = format_bytes(volume.free_bytes)
        if volume.filesystem.lower() in NETWORK_FILESYSTEMS:
            detail = (
                f"{volume.path} is on a network mount ({volume.filesystem} on "
                f"{volume.mount_point}); loading from one has hung GPUs (mlx#3803)"
            )
            hint = "put the model on an internal disk and give its path"
            yield CheckResult("fail", "disk", node, detail, hint)
            continue
        if volume.free_bytes < FULL_DISK_BYTES:
            detail = f"{free} free on {volume.mount_point}: too little even for logs"
            yield CheckResult("fail", "disk", node, detail, on_node(node, "df -h"))
        else:
            yield CheckResult("pass", "disk", node, f"{free} free on {volume.mount_point}")
        yield from _state_disk(node, software)


def _state_disk(node: str, software: Software) -> Iterable[CheckResult]:
    """Check the volume of runs and logs, which may be another one: a launch fails if it is full."""
    volume = software.state_volume
    if volume is None or volume.free_bytes >= FULL_DISK_BYTES:
        return
    detail = f"{format_bytes(volume.free_bytes)} free for runs and logs in {volume.path}"
    yield CheckResult("fail", "disk", node, detail, on_node(node, f"df -h {volume.mount_point}"))


def load(situation: Situation) -> Iterable[CheckResult]:
    """Warn of a machine that is busy with other programs: its measurements would be too slow."""
    for node, software in situation.software.items():
        average, cores = software.load_average, software.cores
        if average is None or cores is None or average <= cores:
            continue
        detail = f"{average:.1f} running programs on {cores} cores: it will be slow"
        yield CheckResult("warn", "load", node, detail, on_node(node, "top"))


def disk_speed(situation: Situation) -> Iterable[CheckResult]:
    """Check the speed of reading the checkpoint's own files, which limits loading."""
    for node, found in (situation.disks or {}).items():
        rate = found.bytes_per_second
        if found.error is not None or rate is None:
            detail = found.error or f"nothing could be read under {found.path}"
            yield CheckResult("skip", "disk speed", node, detail)
            continue
        read = format_bytes(found.read_bytes)
        detail = f"{rate / 1e9:.2f} GB/s over {read} of {found.path}"
        if not found.uncached:
            detail += " (some of it from the cache)"
        need = situation.needs.get(node)
        if need is not None:
            detail += f": weights in {need.weights_bytes / rate:.0f} s"
        slow = rate < SLOW_DISK_BYTES_PER_SECOND
        hint = "put the model on the internal SSD" if slow else None
        yield CheckResult("warn" if slow else "pass", "disk speed", node, detail, hint)


def sleep(situation: Situation) -> Iterable[CheckResult]:
    """Check that a machine neither goes to sleep nor runs on battery."""
    for node in situation.nodes:
        minutes = node.condition.sleep_minutes
        if minutes is not None and minutes > 0:
            detail = f"sleeps after {minutes} min without input"
            if node.condition.sleep_prevented_by:
                detail += f" (prevented for now by {node.condition.sleep_prevented_by})"
            hint = on_node(node.node, "sudo pmset -a sleep 0 disksleep 0")
            yield CheckResult("warn", "sleep", node.node, detail, hint)
        elif minutes == 0:
            yield CheckResult("pass", "sleep", node.node, "never sleeps")
        if node.condition.on_battery:
            detail = "runs on battery, on which macOS slows down and sleeps"
            yield CheckResult("warn", "power", node.node, detail, "plug it in")
