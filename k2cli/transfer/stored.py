"""Models on several machines: what each of them has, and the removal of what nothing needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from k2cli.agent.weights.stored_models import ModelQuestion, Pruned, Removal
from k2cli.errors import ClusterError, UsageError
from k2cli.files import encode_json
from k2cli.models.inventory.stored_model import ModelUse, StoredModels
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.nodes.parallel import map_in_parallel
from k2cli.runs.model_use import launched_folders, models_in_use, models_in_use_elsewhere
from k2cli.runs.record import list_runs
from k2cli.transfer.choose_push import portable_reference

__all__ = ["ModelsOnNodes", "NodeAnswer", "Pruned", "Removal"]

_LIST_SECONDS = 60.0
_REMOVE_SECONDS = 900.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeAnswer(Generic[T]):
    """The answer of one node; if it could not be asked, ``answer`` is None and ``problem`` why."""

    node: str
    answer: T | None
    problem: str = ""


class ModelsOnNodes:
    """Questions to nodes about their models, with what this machine knows about its runs."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._records = list_runs()

    @property
    def is_here(self) -> bool:
        """True if only this machine is asked."""
        return all(node.name == LOCALHOST for node in self._nodes)

    def list_models(self) -> list[NodeAnswer[StoredModels]]:
        """List the models of each node."""
        return self._ask(StoredModels, "list", lambda node: self._question(node))

    def show(self, reference: str, revision: str = "") -> list[NodeAnswer[Removal]]:
        """Describe one model on each node."""
        return self._ask(Removal, "show", lambda node: self._question(node, reference, revision))

    def plan_removal(self, reference: str, revision: str = "") -> list[NodeAnswer[Removal]]:
        """Find what removing a model removes on each node, or why that is refused."""
        return self._ask(Removal, "removal", lambda node: self._question(node, reference, revision))

    def remove(
        self, reference: str, revision: str, folders: Mapping[str, Sequence[str]]
    ) -> list[NodeAnswer[Removal]]:
        """Remove a model from nodes.

        Args:
            folders: the folders that the user has agreed to remove, by node.
        """
        return self._ask(
            Removal,
            "remove",
            lambda node: self._question(node, reference, revision, folders=folders[node]),
            [node for node in self._nodes if node.name in folders],
        )

    def prunable(self, hours: float) -> list[NodeAnswer[Pruned]]:
        """Find what nothing needs on each node."""
        return self._ask(Pruned, "prunable", lambda node: self._question(node, hours=hours))

    def prune(self, hours: float, paths: Mapping[str, Sequence[str]]) -> list[NodeAnswer[Pruned]]:
        """Remove what nothing needs and the user has agreed to remove, by node."""
        return self._ask(
            Pruned,
            "prune",
            lambda node: self._question(node, hours=hours, folders=paths[node]),
            [node for node in self._nodes if node.name in paths],
        )

    def _question(
        self,
        node: str,
        reference: str = "",
        revision: str = "",
        *,
        hours: float = 0.0,
        folders: Sequence[str] = (),
    ) -> ModelQuestion:
        uses = models_in_use(self._records, node)
        others = models_in_use_elsewhere(self._records, node)
        return ModelQuestion(
            _portable(reference) if reference else "",
            revision,
            (
                *(ModelUse(use.run_id, use.folder, use.model) for use in uses),
                *(ModelUse(u.run_id, u.folder, u.model, node=name) for name, u in others),
            ),
            launched_folders(self._records, node),
            tuple(folders),
            hours,
        )

    def _ask(
        self,
        kind: type[T],
        what: str,
        question: Callable[[str], ModelQuestion],
        nodes: Sequence[Node] | None = None,
    ) -> list[NodeAnswer[T]]:
        seconds = _REMOVE_SECONDS if what in ("remove", "prune") else _LIST_SECONDS

        def ask(node: Node) -> NodeAnswer[T]:
            text = encode_json(question(node.name), indent=False)
            try:
                answer: T = node.ask(kind, "models", what, input=text, timeout_seconds=seconds)
            except ClusterError as error:
                return NodeAnswer(node.name, None, error.message)
            return NodeAnswer(node.name, answer)

        asked = self._nodes if nodes is None else nodes
        if len(asked) == 1:  # in this thread, which Ctrl-C interrupts
            return [ask(asked[0])]
        return map_in_parallel(ask, list(asked))


def _portable(reference: str) -> str:
    try:
        return portable_reference(reference)
    except UsageError:
        return reference  # a name that only the Hub's cache of a node knows, or nobody
