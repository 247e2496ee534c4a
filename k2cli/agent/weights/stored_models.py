"""Verbs about the models on this machine: list, describe and remove them, and free what is unused.

Which runs use a model is known from the locks of this machine, and from what the asking machine
knows about its own runs. Nothing that a run uses is removed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from k2cli.agent.locks import list_locks
from k2cli.agent.run_processes import count_processes
from k2cli.errors import K2Error
from k2cli.files import is_same_path, unwritable
from k2cli.models.inventory.hub_cache import read_hub_cache
from k2cli.models.inventory.lookup import matching_models
from k2cli.models.inventory.prune import PruneResult, find_prunable, prune
from k2cli.models.inventory.readers import WAIT, is_being_read, not_read
from k2cli.models.inventory.remove import freed_bytes, remove_models
from k2cli.models.inventory.stored import stored_models
from k2cli.models.inventory.stored_model import ModelUse, StoredModel, StoredModels
from k2cli.models.sources.cache_layout import cache_folder


class ModelQuestion(msgspec.Struct, frozen=True):
    """A question about models, with what the asking machine knows about its runs.

    ``reference`` and ``revision`` are as the user gave them. ``folders`` are those that the user
    has agreed to remove. ``known`` are folders of models that runs were launched with.
    """

    reference: str = ""
    revision: str = ""
    uses: tuple[ModelUse, ...] = ()
    known: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    hours: float = 0.0


class Removal(msgspec.Struct, frozen=True):
    """The models that a removal removes, or the reason why nothing is removed."""

    models: tuple[StoredModel, ...] = ()
    freed_bytes: int = 0
    problem: str = ""
    hint: str = ""


class Pruned(msgspec.Struct, frozen=True):
    """Things that can be removed, or the reason why that is not known or failed."""

    found: PruneResult = PruneResult(())
    problem: str = ""
    hint: str = ""


def list_models(question: ModelQuestion) -> StoredModels:
    """List the models on this machine with the runs that use them, without their files.

    Raises:
        OSError: if the Hub's cache or the locks cannot be read.
    """
    found = _with_uses(question)
    models = tuple(msgspec.structs.replace(model, files=()) for model in found.models)
    return msgspec.structs.replace(found, models=models)


def describe_model(question: ModelQuestion) -> Removal:
    """Describe the revisions of one model, or say that it is not here.

    Raises:
        OSError: as ``list_models``.
    """
    try:
        models = _matching(question)
    except K2Error as error:
        return Removal(problem=error.message, hint=error.hint or "")
    return Removal(tuple(models), freed_bytes(models, read_hub_cache(cache_folder())))


def plan_removal(question: ModelQuestion) -> Removal:
    """Find what a removal removes and frees, or why it is refused; remove nothing.

    Raises:
        OSError: as ``list_models``.
    """
    found = describe_model(question)
    uses = {use.run_id: use.host for use in (*_own_uses(), *question.uses)}
    for model in found.models:
        if model.used_by:
            runs, host = ", ".join(model.used_by), uses.get(model.used_by[0], "")
            where = f", on {host}" if host else ""
            return msgspec.structs.replace(
                found,
                problem=f"'{model.label}' is used by the run {runs}",
                hint=f"k2 stop {model.used_by[0]}{where}",
            )
        if model.writer:
            return msgspec.structs.replace(
                found,
                problem=f"'{model.label}' is being written by a running {model.writer}",
                hint=WAIT,
            )
        if is_being_read(Path(model.folder)):
            return msgspec.structs.replace(
                found, problem=f"'{model.label}' is being sent by a running push", hint=WAIT
            )
        if model.kept_because:
            return msgspec.structs.replace(
                found, problem=f"'{model.label}' is not removed: {model.kept_because}",
                hint=f"see what is there: ls -la {shlex.quote(model.folder)}",
            )  # fmt: skip
    return found


def remove(question: ModelQuestion) -> Removal:
    """Remove the models that the user has agreed to remove, unless something has changed.

    Raises:
        OSError: as ``list_models``.
    """
    planned = plan_removal(question)
    if planned.problem:
        return planned
    if {model.folder for model in planned.models} != set(question.folders):
        problem = f"the files of '{question.reference}' have changed meanwhile"
        return Removal(problem=problem, hint="run the command again")
    try:
        with ExitStack() as unread:
            for model in planned.models:
                unread.enter_context(not_read(Path(model.folder), model.label))
            remove_models(planned.models)
    except K2Error as error:
        return Removal(problem=error.message, hint=error.hint or "")
    return planned


def prunable(question: ModelQuestion) -> Pruned:
    """Find what nothing needs on this machine; remove nothing.

    Raises:
        OSError: as ``list_models``.
    """
    used = [
        model.folder
        for model in _with_uses(question).models
        if model.used_by or is_being_read(Path(model.folder))
    ]
    return Pruned(find_prunable(question.hours, frozenset(used)))


def prune_agreed(question: ModelQuestion) -> Pruned:
    """Remove what nothing needs and the user has agreed to remove.

    Raises:
        OSError: as ``list_models``.
    """
    found = prunable(question).found
    agreed = tuple(item for item in found.items if item.path in question.folders)
    result = Pruned(msgspec.structs.replace(found, items=agreed))
    try:
        prune(agreed)
    except K2Error as error:
        return msgspec.structs.replace(result, problem=error.message, hint=error.hint or "")
    except OSError as error:
        failure = unwritable(error, Path(os.fsdecode(error.filename or cache_folder())))
        return msgspec.structs.replace(result, problem=failure.message, hint=failure.hint or "")
    return result


def _matching(question: ModelQuestion) -> list[StoredModel]:
    stored = _with_uses(question)
    found = matching_models(stored.models, question.reference, question.revision)
    uses = _uses(question)
    return [_used(model, uses) for model in found]


def _with_uses(question: ModelQuestion) -> StoredModels:
    uses = _uses(question)
    folders = {use.folder for use in uses if use.folder and not use.node} | set(question.known)
    found = stored_models(folders)
    return msgspec.structs.replace(
        found, models=tuple(_used(model, uses) for model in found.models)
    )


def _uses(question: ModelQuestion) -> list[ModelUse]:
    """Return the uses that concern this machine.

    Those of other machines do if the folder is on a network volume here, which they may share.
    """
    here = [use for use in question.uses if not use.node or _is_shared(use.folder)]
    return [*here, *_own_uses()]


def _is_shared(folder: str) -> bool:
    from k2cli.agent.software import NETWORK_FILESYSTEMS, volume_of  # slow to import

    volume = volume_of(Path(folder)) if os.path.isdir(folder) else None
    return volume is not None and volume.filesystem.lower() in NETWORK_FILESYSTEMS


def _own_uses() -> list[ModelUse]:
    """Return the runs that have a lock of this machine, with the folder that each has recorded."""
    locks = [lock for lock in list_locks(count_processes) if lock.state != "stale"]
    return [
        ModelUse(lock.claim.run_id, lock.claim.folder, lock.claim.model, lock.claim.host)
        for lock in locks
    ]


def _used(model: StoredModel, uses: Sequence[ModelUse]) -> StoredModel:
    """Add the runs that use a model.

    Without a recorded folder, a run uses every model that may be its own by name. What the asking
    machine knows about a run counts more than what a lock of an earlier version says.
    """
    exact = {use.run_id for use in uses if use.folder}
    runs = [
        use.run_id
        for use in uses
        if (is_same_path(use.folder, model.folder) if use.folder else _is_named(use, model))
        and (use.folder or use.run_id not in exact)
    ]
    return msgspec.structs.replace(model, used_by=tuple(dict.fromkeys(runs)))


def _is_named(use: ModelUse, model: StoredModel) -> bool:
    """True if a run of unknown folder may use a model, by its reference or by the run's id."""
    names = {model.repo.lower(), *model.aliases, model.name.lower(), model.folder.lower()} - {""}
    reference = use.model.lower()
    if use.model:
        is_path = use.model.startswith(("/", "~"))
        same = is_path and is_same_path(os.path.expanduser(use.model), model.folder)
        return same or reference.partition("@")[0] in names or reference in names
    # The id begins with the last part of the model's name.
    begun = use.run_id.rpartition("-")[0]
    words = {_words(name.rpartition("/")[2]) for name in (*names, Path(model.folder).name)}
    return any(word and (begun == word or begun.startswith(f"{word}-")) for word in words)


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:24].strip("-")
