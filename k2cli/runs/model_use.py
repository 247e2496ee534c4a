"""The models that recorded runs use on a node, for commands that list and remove models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.runs.record import RunRecord


@dataclass(frozen=True, slots=True)
class RunModel:
    """The model of a run on one node; ``folder`` is "" if an earlier version has launched it."""

    run_id: str
    model: str
    folder: str


def models_in_use(records: Sequence[RunRecord], node: str) -> list[RunModel]:
    """Return the models of runs that are live on a node, or may have processes left there."""
    return [
        RunModel(record.run_id, record.model, record.model_folders.get(node, ""))
        for record in records
        if (record.live or record.state == "orphaned") and node in record.nodes
    ]


def models_in_use_elsewhere(records: Sequence[RunRecord], node: str) -> list[tuple[str, RunModel]]:
    """Return the folders of models that runs use on other nodes, with the node of each."""
    return [
        (other, use)
        for other in dict.fromkeys(name for record in records for name in record.nodes)
        if other != node
        for use in models_in_use(records, other)
        if use.folder
    ]


def launched_folders(records: Sequence[RunRecord], node: str) -> tuple[str, ...]:
    """Return the folders of models on a node with which runs were launched."""
    found = [record.model_folders.get(node, "") for record in records]
    return tuple(dict.fromkeys(path for path in found if path))
