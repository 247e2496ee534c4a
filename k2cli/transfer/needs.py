"""Segments that a node needs of a model: what it lacks, and files of another content."""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.agent.weights.messages import ANOTHER_SIZE, Lacks, segment_count
from k2cli.errors import ClusterError
from k2cli.models.part import FOLDER
from k2cli.nodes.interpreter import last_line
from k2cli.nodes.node import decode_answer
from k2cli.transfer.parts import Share
from k2cli.transfer.request import PushRequest
from k2cli.units import MIB, format_bytes

_MARGIN_BYTES = 16 * MIB
"""Room beside the files, for journals, links and lists."""
_HASH_BYTES_PER_SECOND = 50_000_000
_LEAST_SECONDS = 60.0
"""Limit of hashing files at the source: a slow disk's rate, and the least time for small files."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Segments that a node needs, by the index of their file, and what becomes of its own files.

    ``same`` are files of the node whose content is the source's, ``replaced`` those of another one.
    """

    missing: dict[int, tuple[int, ...]]
    same: tuple[int, ...]
    replaced: tuple[int, ...]
    missing_bytes: int
    there_bytes: int


def find_needs(request: PushRequest, node: str, share: Share, lacks: Lacks) -> Needs:
    """Find out what a node needs of its share.

    Raises:
        ClusterError: if it has files of the same name with another content that may not be
            replaced, or too little room.
    """
    same, replaced = _compare(request, share, lacks)
    changed = [index for index in replaced if not share.files[index].name.startswith(FOLDER)]
    if changed and not request.replace:
        file = share.files[changed[0]]
        raise ClusterError(
            f"node {node} has another {file.name} in {lacks.folder} than {request.source.name} "
            f"in {request.found.folder}",
            f"to replace it: k2 models push {request.reference} {node} --replace",
        )
    missing = dict(lacks.missing)
    for index in replaced:
        missing[index] = tuple(range(segment_count(share.files[index].nbytes)))
    more = sum(share.files[index].nbytes for index in replaced)
    needed = lacks.missing_bytes + more
    if needed and needed + _MARGIN_BYTES > lacks.free_bytes:
        raise ClusterError(
            f"node {node} has {format_bytes(lacks.free_bytes)} free for {lacks.folder}, "
            f"{request.reference} needs {format_bytes(needed)} there",
            f"ssh {node} df -h",
        )
    total = sum(file.nbytes for file in share.files)
    return Needs(missing, same, replaced, needed, total - needed)


def _compare(
    request: PushRequest, share: Share, lacks: Lacks
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compare the digests of files with another time of change: those that are the same, others."""
    unsure = {index: share.files[index].name for index in lacks.digests}
    sized = [name for index, name in unsure.items() if lacks.digests[index] != ANOTHER_SIZE]
    asked = [name for name in sized if not name.startswith(FOLDER)]
    digests = _source_digests(request, asked) if asked else {}
    same = [i for i, name in unsure.items() if digests.get(name) == lacks.digests[i]]
    return tuple(same), tuple(index for index in unsure if index not in same)


def _source_digests(request: PushRequest, names: list[str]) -> dict[str, str]:
    """Ask the source for the digests of its files."""
    sizes = {file.name: file.nbytes for file in request.found.files}
    seconds = _LEAST_SECONDS + sum(sizes[name] for name in names) / _HASH_BYTES_PER_SECOND
    node, verb = request.source, "weights-digests"
    command = [node.python, "-P", "-m", "k2cli.agent.main", verb, request.found.folder, *names]
    if node.is_local:
        found: dict[str, str] = node.ask(dict[str, str], verb, request.found.folder, *names)
        return found
    done = node.run(command, timeout_seconds=seconds)
    if done.status != 0:
        last = last_line(done.stderr).decode(errors="replace")
        raise ClusterError(f"node {node.name} cannot compare its files: {last}")
    answer: dict[str, str] = decode_answer(node.name, verb, last_line(done.stdout), dict[str, str])
    return answer
