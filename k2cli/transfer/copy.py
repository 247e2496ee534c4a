"""The fallback where k2 does not run on a node: a copy by rsync, or else by scp, file by file.

It brings the whole model from this machine. Digests are compared where the node has a program for
that. Each file arrives under another name first, so that what the node has stays until then. rsync
continues a file that was cut short; scp begins it again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path, PurePosixPath

from k2cli.agent.weights.messages import Target
from k2cli.errors import ClusterError, UsageError
from k2cli.files import name_with
from k2cli.models.digests import sha256_of
from k2cli.nodes.interpreter import last_line
from k2cli.nodes.node import Node
from k2cli.transfer.request import NodeResult, OnPushEvent, PushBytes, PushRequest, PushStep

_PLAIN = re.compile(r"[\w./~+@%-]+", re.ASCII)
_DIGEST_PROGRAMS = (["sha256sum"], ["shasum", "-a", "256"])
_LEAST_SECONDS = 120.0
_SLOWEST_BYTES_PER_SECOND = 1_000_000
"""Limit of copying or hashing one file: a slow link's rate, and the least time for small files."""


def lacks_k2(node: Node) -> bool:
    """True if the node can be reached, but has no k2 of this version.

    Raises:
        ClusterError: if it cannot be reached.
    """
    node.run(["true"])
    try:
        return not node.python
    except ClusterError:
        return True


def copy_to(request: PushRequest, node: Node, on_event: OnPushEvent) -> NodeResult:
    """Copy the whole model from this machine to a node.

    Raises:
        UsageError: if the model is not on this machine, or its folder's name has odd characters.
        ClusterError: if a copy fails, or differs from its source.
    """
    target = request.found.target
    if not request.source.is_local or target is None:
        raise UsageError(
            f"node {node.name} has no k2 of this version, so the model must be on this machine",
            f"k2 cluster prepare --nodes {node.name}",
        )
    folder = _folder_there(node, target)
    if not _PLAIN.fullmatch(folder):
        raise UsageError(f"'{folder}' has characters that rsync and scp would misread")
    began = time.monotonic()
    program = _program(node)
    on_event(PushStep(f"copying {request.reference} to {node.name} by {program[0]}"))
    done = sent = 0
    total = sum(file.nbytes for file in request.found.files)
    for file in request.found.files:
        source = (Path(request.found.folder) / file.name).resolve()
        place = PurePosixPath(folder) / file.name
        if not _is_there(request, node, source, place, file.nbytes):
            _mkdir(node, str(place.parent))
            partial = place.with_name(name_with(f".{place.name}", ".k2-incoming"))
            _copy_file(program, source, node, str(partial), file.nbytes)
            _compare(node, source, str(partial), file.nbytes)
            _rename(node, str(partial), str(place))
            sent += file.nbytes
        done += file.nbytes
        on_event(PushBytes(done, total))
    for name in target.references:
        _write_reference(node, folder, name, target.commit)
    seconds = time.monotonic() - began
    return NodeResult(node.name, folder, sent, total - sent, seconds, program[0])


def _folder_there(node: Node, target: Target) -> str:
    """Return the folder of the model on the node, as its own k2 will find it."""
    if target.kind == "path":
        return target.name.removeprefix("~/")
    if target.kind == "alias":
        base = _variable(node, "K2_DATA_DIR") or _below(node, "XDG_DATA_HOME", "k2")
        return f"{base or '.local/share/k2'}/models/{target.name}"
    base = (
        _variable(node, "HF_HUB_CACHE")
        or _below(node, "HF_HOME", "hub")
        or _below(node, "XDG_CACHE_HOME", "huggingface/hub")
        or ".cache/huggingface/hub"
    )
    repository = "--".join(("models", *target.name.split("/")))
    return f"{base}/{repository}/snapshots/{target.commit}"


def _variable(node: Node, name: str) -> str:
    done = node.run(["printenv", name])
    return last_line(done.stdout).decode(errors="replace") if done.status == 0 else ""


def _below(node: Node, name: str, path: str) -> str:
    base = _variable(node, name)
    return f"{base}/{path}" if base else ""


def _program(node: Node) -> list[str]:
    there = node.run(["sh", "-c", "command -v rsync"]).status == 0
    if there and shutil.which("rsync"):
        return ["rsync", "-t", "--partial", "-e", "ssh -o BatchMode=yes"]
    return ["scp", "-p", "-q", "-o", "BatchMode=yes"]


def _mkdir(node: Node, folder: str) -> None:
    done = node.run(["mkdir", "-p", folder])
    if done.status != 0:
        reason = last_line(done.stderr).decode(errors="replace")
        raise ClusterError(f"node {node.name} cannot make {folder}: {reason}")


def _copy_file(program: list[str], source: Path, node: Node, place: str, nbytes: int) -> None:
    limit = _LEAST_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND
    try:
        done = subprocess.run(
            [*program, str(source), f"{node.name}:{place}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"{program[0]} to node {node.name} failed: {error}") from error
    if done.returncode != 0:
        reason = last_line(done.stderr).decode(errors="replace")
        raise ClusterError(f"{program[0]} to node {node.name} failed: {reason}", "try again")


def _is_there(
    request: PushRequest, node: Node, source: Path, place: PurePosixPath, nbytes: int
) -> bool:
    """True if the node has a file already.

    Raises:
        ClusterError: if it has another one of this name, and may not replace it.
    """
    if node.run(["test", "-e", str(place)]).status != 0:
        return False
    if _digest_there(node, str(place), nbytes) == sha256_of(source):
        return True
    if not request.replace:
        raise ClusterError(
            f"node {node.name} has another {place.name} in {place.parent} than this machine",
            f"to replace it: k2 models push {request.reference} {node.name} --replace",
        )
    return False


def _digest_there(node: Node, place: str, nbytes: int) -> str:
    """Return the SHA-256 of a node's file; "" if the node has no program for it."""
    limit = _LEAST_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND
    for program in _DIGEST_PROGRAMS:
        done = node.run([*program, place], timeout_seconds=limit)
        if done.status == 0:
            return last_line(done.stdout).split()[0].decode(errors="replace").lstrip("\\")
    return ""


def _compare(node: Node, source: Path, place: str, nbytes: int) -> None:
    """Compare the digests at both ends, if the node has a program for it."""
    found = _digest_there(node, place, nbytes)
    if found and found != sha256_of(source):
        raise ClusterError(f"{place} on node {node.name} differs from {source}", "try again")


def _rename(node: Node, partial: str, place: str) -> None:
    done = node.run(["mv", "-f", partial, place])
    if done.status != 0:
        reason = last_line(done.stderr).decode(errors="replace")
        raise ClusterError(f"node {node.name} cannot write {place}: {reason}")


def _write_reference(node: Node, folder: str, name: str, commit: str) -> None:
    path = PurePosixPath(folder).parent.parent / "refs" / name
    _mkdir(node, str(path.parent))
    done = node.run(["dd", f"of={path}"], commit.encode())
    if done.status != 0:
        raise ClusterError(f"node {node.name} cannot write {path}")
