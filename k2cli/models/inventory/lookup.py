"""Find the models that a user means by a reference among those on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from k2cli.errors import K2Error, UsageError
from k2cli.files import is_same_path
from k2cli.models.inventory.folders import described_folder, shown_path
from k2cli.models.inventory.stored_model import StoredModel
from k2cli.models.reference import (
    ModelReference,
    converted_folder,
    modelscope_folder,
    parse_reference,
)

_LEAST_LETTERS = 4


def matching_models(
    models: Sequence[StoredModel], text: str, revision: str = ""
) -> list[StoredModel]:
    """Return the models that a reference means: all revisions of a repository, or one.

    Args:
        models: those on this machine.
        text: an alias, ``owner/name`` with an optional ``@revision``, or a path.
        revision: a branch, a tag or the beginning of a commit.

    Raises:
        UsageError: if it cannot be a reference.
        K2Error: if there is no such model, or no such revision of it.
    """
    repo, _, wanted = text.partition("@")
    found = [model for model in models if model.kind == "hub" and model.repo == repo]
    if not found:
        reference = parse_reference(text)
        if reference.modelscope_repo and revision:
            named = _referred(models, replace(reference, revision=revision))
            if named:
                return named
        found = _referred(models, reference)
        wanted = "" if reference.modelscope_repo else reference.revision or ""
    if not found:
        raise K2Error(f"model '{text}' is not on this machine", "k2 models list")
    for each in (wanted, revision):
        if each:
            found = _of_revision(found, text, each)
    return found


def _referred(models: Sequence[StoredModel], reference: ModelReference) -> list[StoredModel]:
    if reference.repo is not None:
        return [each for each in models if each.kind == "hub" and each.repo == reference.repo]
    if reference.modelscope_repo is not None:
        # The revision is in the name of the folder.
        place = modelscope_folder(reference.modelscope_repo, reference.revision)
        return [model for model in models if is_same_path(model.folder, place)]
    folder = reference.path
    if folder is None or folder.is_file():
        folder = converted_folder(reference)
    if folder is None:
        return []
    found = [model for model in models if is_same_path(model.folder, folder)]
    if not found and folder.is_dir() and reference.path is not None:
        path = Path(os.path.abspath(folder))
        return [described_folder(path, "folder", shown_path(path))]
    return found


def _of_revision(models: Sequence[StoredModel], text: str, revision: str) -> list[StoredModel]:
    named = [model for model in models if revision in model.references]
    if not named and len(revision) >= _LEAST_LETTERS:
        named = [model for model in models if model.commit.startswith(revision)]
    if len({model.commit for model in named}) > 1:
        raise UsageError(
            f"'{revision}' is the beginning of several revisions of '{text}'", "k2 models list"
        )
    if not named:
        here = ", ".join(
            f"{model.commit[:8]} {' '.join(model.references)}".strip() for model in models
        )
        raise K2Error(f"'{text}' has no revision '{revision}' on this machine", f"it has {here}")
    return named
