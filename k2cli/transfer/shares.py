"""Shares of nodes in a model: the files that each would get, and those that it lacks."""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.errors import InternalError
from k2cli.models.part import FOLDER
from k2cli.transfer.parts import share_of
from k2cli.transfer.request import PushRequest
from k2cli.transfer.stored import ModelsOnNodes, NodeAnswer, Removal


@dataclass(frozen=True, slots=True)
class ShareFile:
    """A file that a node is to have; ``missing_bytes`` are those that it lacks."""

    name: str
    nbytes: int
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The share of one node. ``problem`` says why the node could not be asked what it has."""

    node: str
    files: tuple[ShareFile, ...]
    problem: str = ""


def shares_of_nodes(request: PushRequest) -> list[NodeShare]:
    """Ask each node what it has of its share of a model of the Hub; nothing is sent or made.

    Sizes are compared; the push itself compares contents too.
    """
    target = request.found.target
    if target is None:
        raise InternalError("a model without a place was to be shared")
    answers = ModelsOnNodes(request.nodes).show(target.name, target.commit)
    return [
        _share(request, node.name, answer)
        for node, answer in zip(request.nodes, answers, strict=True)
    ]


def _share(request: PushRequest, node: str, answer: NodeAnswer[Removal]) -> NodeShare:
    models = answer.answer.models if answer.answer is not None else ()
    there = {
        file.name: file.bytes if file.is_here else file.partial_bytes
        for model in models
        for file in model.files
    }
    files = tuple(
        ShareFile(file.name, file.nbytes, max(0, file.nbytes - there.get(file.name, 0)))
        for file in share_of(request.found, request.wanted.get(node)).files
        if not file.name.startswith(FOLDER)
    )
    return NodeShare(node, files, answer.problem)
