"""Command ``k2 models list``: the models on this machine, or on those of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from k2cli.commands.models.nodes import OfCluster, models_on, raise_problems
from k2cli.commands.options import AsJson, NodeNames

if TYPE_CHECKING:
    from k2cli.models.inventory.stored_model import StoredModels
    from k2cli.transfer.stored import NodeAnswer


def list_models(cluster: OfCluster = None, nodes: NodeNames = None, json: AsJson = False) -> None:
    """List the models on this machine, whether they are complete, and what uses them.

    These are the Hub's cache, converted models, and folders to which a model was written or from
    which one was launched. With --cluster, it shows what each machine has.

    Example: k2 models list --cluster studios
    """
    from k2cli.ui.models_view import print_models
    from k2cli.ui.output import print_json, warn
    from k2cli.ui.slow import told_if_slow

    with told_if_slow("reading the models"):
        answers = models_on(cluster, nodes).list_models()
    found = [(each.node, each.answer) for each in answers if each.answer is not None]
    for _, answer in found:
        for problem in answer.problems:
            warn(f"left out: {problem}")
    if json:
        print_json({"schema_version": 1, "nodes": [_document(each) for each in answers]})
    elif found:
        print_models(found, show_nodes=cluster is not None or nodes is not None)
    raise_problems(answers)


def _document(answer: NodeAnswer[StoredModels]) -> dict[str, Any]:
    import msgspec

    if answer.answer is None:
        return {"node": answer.node, "problem": answer.problem, "models": []}
    found: dict[str, Any] = msgspec.to_builtins(answer.answer)
    for model in found["models"]:
        del model["files"]
    return {"node": answer.node, "problem": "", **found}
