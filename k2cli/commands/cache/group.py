"""Commands ``k2 cache ...``: the caches of prompts that runs have left on this machine's disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.models.nodes import Yes, confirm
from k2cli.commands.options import AsJson

if TYPE_CHECKING:
    from k2cli.errors import K2Error
    from k2cli.prefix_folder import StoreFolder

_HELP = "List or remove the caches of prompts that runs have kept on this machine's disk."

cache = typer.Typer(
    name="cache",
    help=_HELP,
    short_help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def list_(json: AsJson = False) -> None:
    """List the caches of prompts on this machine's disk, one line per model and rank.

    They are made by k2 launch --prefix-cache-disk. Those that are empty, and that no run uses, are
    left out: the next run that keeps caches on this disk removes them.

    Example: k2 cache list
    """
    from k2cli.prefix_folder import stores
    from k2cli.ui.cache_view import print_stores, store_document
    from k2cli.ui.output import print_json

    found = [store for store in stores() if not store.is_empty]
    if json:
        print_json({"schema_version": 1, "caches": [store_document(store) for store in found]})
    else:
        print_stores(found)


def clear(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only those of the model whose folder has this name, as listed."
        ),
    ] = None,
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """Remove the caches of prompts from this machine's disk.

    A run that uses one goes on. What it has in memory stays there, and is used, until it ends: to
    remove all that is kept of prompts, stop it first. Run it on each node of a cluster.

    Example: k2 cache clear --yes
    """
    import shlex

    from k2cli.prefix_folder import remove_secret, remove_store, stores
    from k2cli.ui.cache_view import print_stores, store_document
    from k2cli.ui.output import note, print_json, print_line
    from k2cli.units import format_bytes

    found = stores()
    if model is not None:
        named = [store for store in found if store.model == model]
        if not named:
            raise _no_cache(model, found)
        found = named
    total = sum(store.nbytes for store in found)
    holding = [store for store in found if not store.is_empty]
    if holding:
        if not json:
            print_stores(holding)
        used = sum(store.in_use for store in holding)
        also = f" ({used} of them used by a run)" if used else ""
        option = f" --model {shlex.quote(model)}" if model is not None else ""
        confirm(f"remove this, {format_bytes(total)}{also}?", yes, f"k2 cache clear{option}")
    if model is None:  # first: a run whose store is removed asks for a new one
        remove_secret()
    left: dict[Path, OSError] = {}
    for store in found:
        try:
            remove_store(store.folder)
        except OSError as error:
            left[store.folder] = error
    removed = [store for store in holding if store.folder not in left]
    freed = sum(store.nbytes for store in removed)
    if json:
        documents = [store_document(store) for store in removed]
        print_json({"schema_version": 1, "freed_bytes": freed, "removed": documents})
    elif removed:
        print_line(f"freed {format_bytes(freed)}")
    elif not left:
        note("no caches of prompts are on this disk")
    if left:
        raise _left(left, len(found))


def _left(left: Mapping[Path, OSError], tried: int) -> K2Error:
    """Return the error for caches that could not be removed, with the first one's cause."""
    import shlex

    from k2cli.errors import K2Error

    folder, error = next(iter(left.items()))
    place = error.filename or folder
    return K2Error(
        f"{len(left)} of {tried} caches could not be removed: '{place}': {error.strerror or error}",
        f"ls -ld {shlex.quote(os.path.dirname(place))} {shlex.quote(str(place))}",
    )


def _no_cache(model: str, found: Sequence[StoreFolder]) -> K2Error:
    """Return the error for a name without caches, with a command for the name that was meant."""
    import difflib
    import shlex

    from k2cli.errors import K2Error

    message = f"no cache of model '{model}' is on this disk"
    there = list(dict.fromkeys(store.model for store in found if store.model.isprintable()))
    last = model.rstrip("/").rpartition("/")[2]
    meant = [name for name in there if name and name.rpartition("/")[2] == last]
    meant = meant or difflib.get_close_matches(model, there, 1)
    if not meant:
        return K2Error(message, "k2 cache list")
    return K2Error(message, f"k2 cache clear --model {shlex.quote(meant[0])}")


for _name, _command in (("list", list_), ("clear", clear)):
    # Given in full, because typer would cut off a long line in the list of commands.
    _short = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    cache.command(_name, short_help=_short)(_command)
