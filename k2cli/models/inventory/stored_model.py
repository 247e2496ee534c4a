"""A model on a machine, as ``k2 models list`` and ``show`` describe it."""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.models.inventory.verified import Verified
from k2cli.models.inventory.writers import Writer

Kind = Literal["hub", "converted", "folder"]
State = Literal["complete", "part", "incomplete", "config", "other"]


class ModelUse(msgspec.Struct, frozen=True):
    """A run that uses a model on a machine.

    ``folder`` is "" if the run was launched by a version of k2 that did not record it. ``model`` is
    then the reference of the launch, or "" if only the run's id is known. ``host`` is the machine
    that launched it, "" for the one that asks. ``node`` is another machine on which the run uses
    that folder, "" for the one that is asked: both may have one folder on a network volume.
    """

    run_id: str
    folder: str = ""
    model: str = ""
    host: str = ""
    node: str = ""


class ModelFile(msgspec.Struct, frozen=True):
    """A file of a model. ``bytes`` are those that it has, or will have if it is not here.

    ``partial_bytes`` of a file that is not here have arrived by an interrupted transfer.
    """

    name: str
    bytes: int
    is_here: bool
    partial_bytes: int = 0


class StoredModel(msgspec.Struct, frozen=True):
    """One revision of a model in the Hub's cache, or one folder with a model.

    ``name`` is what a user types for it. The model takes ``bytes`` on the disk; ``added_bytes`` of
    them are not shared with a revision that is listed before it, and removing this one alone frees
    ``own_bytes``. ``missing_bytes`` is None if it is not known how much is missing. ``state`` is
    ``config`` if there are no weights, and ``other`` for a repository that k2 cannot run.
    ``kept_because`` is the reason why k2 does not remove it; "" if it may.
    """

    name: str
    kind: Kind
    folder: str
    state: State
    bytes: int
    added_bytes: int
    own_bytes: int
    missing_bytes: int | None = 0
    repo: str = ""
    commit: str = ""
    references: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    format: str = ""
    architecture: str = ""
    quantization: str = ""
    source: str = ""
    writer: Writer = ""
    verified: Verified | None = None
    used_by: tuple[str, ...] = ()
    kept_because: str = ""
    files: tuple[ModelFile, ...] = ()

    @property
    def label(self) -> str:
        """The name without a commit, which a table shows beside it."""
        return self.repo if self.commit and self.name == f"{self.repo}@{self.commit}" else self.name


class StoredModels(msgspec.Struct, frozen=True):
    """All models on a machine.

    ``leftover_bytes`` are those of interrupted transfers and contents that no model listed has.
    """

    models: tuple[StoredModel, ...]
    bytes: int
    leftover_bytes: int
    cache: str
    problems: tuple[str, ...] = ()
