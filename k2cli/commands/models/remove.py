"""Command ``k2 models remove``: remove a model that no run uses."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.models.nodes import (
    OfCluster,
    Yes,
    confirm,
    models_on,
    raise_absent,
    raise_problems,
)
from k2cli.commands.models.path import ModelArgument
from k2cli.commands.options import AsJson, NodeNames

if TYPE_CHECKING:
    from k2cli.transfer.stored import NodeAnswer, Removal


def remove(
    model: ModelArgument,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or beginning of a commit; default: all.")
    ] = None,
    yes: Yes = False,
    cluster: OfCluster = None,
    nodes: NodeNames = None,
    json: AsJson = False,
) -> None:
    """Remove a model, and say before what goes and how many bytes that frees.

    Files that another revision has stay. Nothing is removed that a run uses, or that a download or
    a push is writing. Of a folder outside k2's stores, only files that k2 wrote are removed.

    Example: k2 models remove demo --yes
    """
    from k2cli.ui.models_view import print_removal, print_removed
    from k2cli.ui.output import note, print_json
    from k2cli.ui.slow import told_if_slow

    asked = models_on(cluster, nodes)
    with told_if_slow("reading the models"):
        planned = asked.plan_removal(model, revision or "")
    raise_problems(planned)
    there = [each for each in planned if each.answer is not None and each.answer.models]
    if not there:
        raise_absent(model, planned)
    _raise_refusal(there, named=not asked.is_here)
    command = _command(model, revision, cluster, nodes)
    print_removal([(each.node, each.answer) for each in there if each.answer is not None])
    confirm("remove this?", yes, command)
    folders = {
        each.node: [found.folder for found in each.answer.models]
        for each in there
        if each.answer is not None
    }
    try:
        removed = asked.remove(model, revision or "", folders)
    except KeyboardInterrupt:
        note(f"\nthe model is now incomplete; to remove the rest: {command} --yes")
        raise
    answered = [(each.node, each.answer) for each in removed if each.answer is not None]
    done = [(node, answer) for node, answer in answered if not answer.problem]
    if json:
        documents = [
            {"node": node, "freed_bytes": answer.freed_bytes, "models": answer.models}
            for node, answer in done
        ]
        print_json({"schema_version": 1, "model": model, "nodes": documents})
    else:
        print_removed(model, done)
    raise_problems(removed)
    _raise_refusal(removed, named=not asked.is_here)


def _raise_refusal(answers: list[NodeAnswer[Removal]], *, named: bool) -> None:
    """Raise the reason of the first machine that removes nothing.

    Raises:
        K2Error: with the machine's reason.
    """
    from k2cli.errors import K2Error

    for each in answers:
        if each.answer is not None and each.answer.problem:
            where = f"node {each.node}: " if named else ""
            raise K2Error(f"{where}{each.answer.problem}", each.answer.hint or None)


def _command(model: str, revision: str | None, cluster: str | None, nodes: str | None) -> str:
    options = {"--revision": revision, "--cluster": cluster, "--nodes": nodes}
    given = [f"{option} {shlex.quote(value)}" for option, value in options.items() if value]
    return " ".join(["k2 models remove", shlex.quote(model), *given])
