"""Checks of access and software: ssh, host keys, k2, mlx, Python, systems and MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import PurePath

from k2cli.agent.software import Software
from k2cli.doctor.results import CheckResult, Situation, Status, on_node, spread
from k2cli.nodes.node import LOCALHOST
from k2cli.pip_command import OPEN_MPI, pip_install

_PREPARE = "k2 cluster prepare --nodes {node}"


def access(situation: Situation) -> Iterable[CheckResult]:
    """Check that ssh needs no password and knows the host's key."""
    for node in situation.nodes:
        if node.failure is None:
            yield CheckResult("pass", "ssh", node.node, "answers without asking for a password")
            continue
        name = "host key" if "host key" in node.failure else "ssh"
        hint = node.failure_hint or f"ssh {node.node} true"
        yield CheckResult("fail", name, node.node, node.failure, hint)


def installed(situation: Situation) -> Iterable[CheckResult]:
    """Check that k2 answers on each node and its mlx loads."""
    for node in situation.nodes:
        if node.failure is not None:
            continue
        prepare = _PREPARE.format(node=node.node)
        if node.software is None:
            detail = node.software_failure or "k2 does not answer there"
            yield CheckResult("fail", "k2", node.node, detail, prepare)
        elif node.software.mlx_error is not None:
            detail = f"mlx does not load: {node.software.mlx_error}"
            yield CheckResult("fail", "mlx", node.node, detail, prepare)
        else:
            yield CheckResult("pass", "k2", node.node, f"runs under {node.software.python}")


def versions(situation: Situation) -> Iterable[CheckResult]:
    """Check that all nodes have the same k2, mlx and mlx-lm; warn if their Pythons differ."""
    yield from _same(situation, "k2 version", lambda each: each.k2_version, fatal=True)
    yield from _same(situation, "mlx version", lambda each: each.mlx_version, fatal=True)
    yield from _same(situation, "mlx-lm version", lambda each: each.mlx_lm_version, fatal=True)
    yield from _same(
        situation, "Python", lambda each: ".".join(each.python_version.split(".")[:2]), fatal=False
    )


def _same(
    situation: Situation, name: str, value: Callable[[Software], str | None], *, fatal: bool
) -> Iterable[CheckResult]:
    found = {node: value(each) or "none" for node, each in situation.software.items()}
    wanted = (
        value(situation.reference)
        if situation.reference is not None
        else next(iter(found.values()), None)
    )
    different = [node for node, each in found.items() if each != wanted or each == "none"]
    if not different:
        if found:
            yield CheckResult("pass", name, None, f"{wanted} on {len(found)} node(s)")
        return
    for node in different:
        detail = f"{found[node]}, the launching machine has {wanted}"
        status: Status = "fail" if fatal else "warn"
        yield CheckResult(status, name, node, detail, _PREPARE.format(node=node))


def systems(situation: Situation) -> Iterable[CheckResult]:
    """Check for one kind of system and one macOS release: RDMA has failed between releases."""
    kinds = {node: each.os_name for node, each in situation.machines.items()}
    if len(set(kinds.values())) > 1:
        detail = f"different systems: {spread(kinds)}; this combination is not tested"
        yield CheckResult("warn", "system", None, detail)
    releases = {node: each.os_version for node, each in situation.macs.items()}
    if len(set(releases.values())) > 1:
        newest = max(releases.values(), key=version_key)
        behind = [node for node, each in releases.items() if each != newest]
        hint = "; ".join(on_node(node, "sudo softwareupdate --install --all") for node in behind)
        yield CheckResult("warn", "system", None, f"{spread(releases)} (macOS)", hint)
    elif kinds and len(set(kinds.values())) == 1:
        values = {f"{each.os_version}" for each in situation.machines.values()}
        name = "macOS " if situation.macs else ""
        listed = ", ".join(sorted(values))
        yield CheckResult("pass", "system", None, f"{name}{listed}")


def version_key(text: str) -> tuple[int, ...]:
    """Return a key that sorts versions by number: ``26.10`` is newer than ``26.2``."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal() and len(part) < 10)


def mpi(situation: Situation) -> Iterable[CheckResult]:
    """Check that all nodes have Open MPI of one major version, with its library."""
    wanted = situation.transport == "mpi"
    bad: Status = "fail" if wanted else "warn"
    if not wanted and all(each.mpirun is None for each in situation.software.values()):
        if len(situation.software) > 1:
            yield CheckResult("skip", "mpirun", None, "no node has it; MLX's ring needs none")
        return
    majors: dict[str, str] = {}
    for node, each in situation.software.items():
        install = f"{_install_mpi(situation, node)}; or without it: --backend ring"
        if each.mpirun is None:
            yield CheckResult(bad, "mpirun", node, "there is no mpirun", install)
        elif each.mpi_version is None:
            detail = f"{each.mpirun}: {each.mpi_error or 'its version is unknown'}"
            yield CheckResult(bad, "mpirun", node, detail, install)
        elif each.libmpi is None:
            detail = f"{each.mpirun} is there without the library that mlx loads"
            yield CheckResult(bad, "mpirun", node, detail, install)
        else:
            majors[node] = each.mpi_version_with(situation.reference) or each.mpi_version
    if len({each.split(".")[0] for each in majors.values()}) > 1:
        detail = f"different major versions do not work together: {spread(majors)}"
        hint = "install the same major version on all of them; or without it: --backend ring"
        yield CheckResult(bad, "mpirun", None, detail, hint)
    elif majors and len(majors) == len(situation.software):
        listed = ", ".join(sorted(set(majors.values())))
        yield CheckResult("pass", "mpirun", None, f"Open MPI {listed} on {len(majors)} node(s)")


def _install(node: str, software: Software, package: str) -> str:
    """Return the command that installs a package for k2's Python on a node."""
    return on_node(node, pip_install(package, python=software.python))


def _install_mpi(situation: Situation, node: str) -> str:
    """Return the command that installs Open MPI on a node: with k2, if k2 brings it there."""
    own = situation.reference
    brought = own is not None and own.mpirun is not None and _beside(own.mpirun, own.python)
    if node != LOCALHOST and brought:
        return _PREPARE.format(node=node)
    return _install(node, situation.software[node], OPEN_MPI)


def _beside(one: str, other: str) -> bool:
    return PurePath(one).parent == PurePath(other).parent


def nccl(situation: Situation) -> Iterable[CheckResult]:
    """Check for NCCL on nodes with an NVIDIA GPU, or on all nodes if it is wanted."""
    wanted = situation.transport == "nccl"
    for node, each in situation.software.items():
        if each.device != "cuda":
            if wanted:
                detail = f"it joins NVIDIA GPUs, and MLX computes with {each.device or 'nothing'}"
                yield CheckResult("fail", "NCCL", node, detail, "--backend ring")
        elif "nccl" not in each.transports:
            bad: Status = "fail" if wanted else "warn"
            detail = "this build of MLX has no NCCL; tensor parallelism is slow without it"
            yield CheckResult(bad, "NCCL", node, detail, _install(node, each, "mlx[cuda13]"))
        else:
            yield CheckResult("pass", "NCCL", node, "MLX has it; launch uses it between GPUs")
