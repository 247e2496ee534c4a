"""Options of the commands about stored models, and the machines that they mean."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from k2cli.transfer.stored import ModelsOnNodes, NodeAnswer

OfCluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="NAME", help="On the machines of a cluster, not on this."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")]


def models_on(cluster: str | None, nodes: str | None) -> ModelsOnNodes:
    """Return the machines that a command line names; this one if it names none."""
    from k2cli.cluster.node_lookup import chosen_nodes, node_named
    from k2cli.nodes.node import LOCALHOST
    from k2cli.transfer.stored import ModelsOnNodes

    if cluster is None and nodes is None:
        return ModelsOnNodes([node_named(LOCALHOST)])
    return ModelsOnNodes(chosen_nodes(cluster, nodes)[1])


def raise_problems(answers: list[NodeAnswer[Any]]) -> None:
    """Raise an error for the machines that could not be asked.

    Raises:
        K2Error: if that is this machine.
        ClusterError: if it is another one.
    """
    from k2cli.errors import ClusterError, K2Error
    from k2cli.nodes.node import LOCALHOST

    failed = [each for each in answers if each.answer is None]
    if not failed:
        return
    text = "; ".join(each.problem for each in failed)
    raise K2Error(text) if all(each.node == LOCALHOST for each in failed) else ClusterError(text)


def raise_absent(model: str, answers: list[NodeAnswer[Any]]) -> NoReturn:
    """Raise the error for a model that is on none of the machines.

    Raises:
        UsageError: if it is no reference of a model.
        K2Error: otherwise.
    """
    from k2cli.errors import K2Error
    from k2cli.models.reference import parse_reference

    parse_reference(model)
    answer: Any = answers[0].answer
    if len(answers) > 1:
        names = ", ".join(each.node for each in answers)
        raise K2Error(f"model '{model}' is not on {names}", "k2 models list")
    raise K2Error(answer.problem, answer.hint or None)


def confirm(question: str, yes: bool, command: str) -> None:
    """Ask before something is removed.

    Raises:
        UsageError: if there is no terminal to ask on, and ``yes`` is not set.
        K2Error: if the user does not agree.
    """
    from k2cli.errors import K2Error, UsageError
    from k2cli.ui.output import note

    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("without a terminal to ask on, nothing is removed", f"{command} --yes")
    note(f"{question} [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise K2Error("nothing was removed")
