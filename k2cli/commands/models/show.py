"""Command ``k2 models show``: all that is known on a machine about one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.commands.models.nodes import OfCluster, models_on, raise_absent, raise_problems
from k2cli.commands.models.path import ModelArgument
from k2cli.commands.options import AsJson, NodeNames

if TYPE_CHECKING:
    from k2cli.transfer.stored import NodeAnswer, Removal


def show(
    model: ModelArgument,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or beginning of a commit; default: all.")
    ] = None,
    cluster: OfCluster = None,
    nodes: NodeNames = None,
    json: AsJson = False,
) -> None:
    """Show the files and revisions of a model, when it was verified, and what uses it.

    Example: k2 models show demo
    """
    from k2cli.ui.models_view import print_model
    from k2cli.ui.output import print_json
    from k2cli.ui.slow import told_if_slow

    with told_if_slow("reading the models"):
        answers = models_on(cluster, nodes).show(model, revision or "")
    found = [(each.node, each.answer) for each in answers if each.answer is not None]
    if not any(answer.models for _, answer in found):
        raise_problems(answers)
        raise_absent(model, answers)
    if json:
        print_json({"schema_version": 1, "nodes": [_document(each) for each in answers]})
    else:
        print_model(found, show_nodes=cluster is not None or nodes is not None)
    raise_problems(answers)


def _document(answer: NodeAnswer[Removal]) -> dict[str, Any]:
    found = answer.answer
    if found is None:
        return {"node": answer.node, "problem": answer.problem, "models": []}
    return {"node": answer.node, "problem": found.problem, "models": found.models}
