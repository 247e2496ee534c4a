"""Config and tensors of a model reference, read without its weights.

The first source that exists is used: the checkpoint on this machine, a GGUF file's header, the
config that k2 ships for an alias, or the headers of a repository on the Hub.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from k2cli.errors import K2Error, NotAuthorisedError
from k2cli.models.catalog import CatalogEntry, HubSource, catalog, unsaid_fields
from k2cli.models.checkpoint import Checkpoint, read_checkpoint
from k2cli.models.layout import names_in
from k2cli.models.reference import (
    ModelReference,
    local_checkpoint,
    parse_reference,
    present_folder,
    without_config,
)


def inspect_model(text: str) -> Checkpoint:
    """Read config and tensors of a model reference; without tensors if only its config is known.

    Raises:
        UsageError: if ``text`` is not a model reference.
        NotAuthorisedError: if the Hub denies access.
        K2Error: if no source is available, or the one found is damaged.
    """
    reference = parse_reference(text)
    folder = present_folder(reference)
    if folder is not None and os.path.lexists(folder / "config.json"):
        return _with_refusal(text, read_checkpoint(folder))
    if reference.kind == "local" and folder is not None:
        raise without_config(text, names_in(folder))
    if reference.path is not None:
        from k2cli.models.gguf.convert import gguf_checkpoint

        return gguf_checkpoint(reference.path)
    if reference.entry is not None and reference.entry.config_folder is not None:
        return _carried(reference.entry, reference.entry.config_folder)
    if reference.repo is None:
        raise K2Error(f"model '{text}' is not on this machine", f"k2 download {text}")
    return _from_hub(reference, reference.repo)


def _with_refusal(text: str, checkpoint: Checkpoint) -> Checkpoint:
    """Add a warning if a launch refuses a folder that can be planned: it has no weights to load."""
    if checkpoint.tensors:
        return checkpoint
    try:
        local_checkpoint(text)
    except K2Error as error:
        hint = f" ({error.hint})" if error.hint else ""
        warning = f"planned from config.json alone; a launch refuses this folder: {error}{hint}"
        return replace(checkpoint, warnings=(*checkpoint.warnings, warning))
    return checkpoint


def _from_hub(reference: ModelReference, repo: str) -> Checkpoint:
    from k2cli.models.sources.hub_headers import remote_checkpoint

    try:
        return remote_checkpoint(repo, reference.revision)
    except NotAuthorisedError:
        raise
    except K2Error as error:
        # Without the Hub, a repository whose config is shipped can still be planned.
        for entry in catalog().values():
            known = isinstance(entry.source, HubSource) and entry.source.repo == repo
            if known and entry.config_folder is not None and reference.revision is None:
                return _carried(entry, entry.config_folder)
        if reference.entry is not None:
            hint = f"; {error.hint}" if error.hint else ""
            error.hint = (
                f"k2 carries no shape of '{reference.entry.alias}': a plan reads it from the Hub, "
                f"once{hint}"
            )
        raise


def _carried(entry: CatalogEntry, folder: Path) -> Checkpoint:
    """Return the shipped config, with the changes that this entry's checkpoint has."""
    checkpoint = read_checkpoint(folder)
    changes = dict(entry.overrides)
    config = checkpoint.config
    if "text_config" in config and "max_position_embeddings" in changes:
        length = changes.pop("max_position_embeddings")
        text = {**config["text_config"], "max_position_embeddings": length}
        config = {**config, "text_config": text}
    return replace(checkpoint, config={**config, **unsaid_fields(folder.name), **changes})
