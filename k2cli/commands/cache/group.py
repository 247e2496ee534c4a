"""Commands ``k2 cache ...``: the caches of prompts that runs have left on this machine's disk."""

from __future__ import annotations

from typing import Annotated

import typer

from k2cli.commands.models.nodes import Yes, confirm
from k2cli.commands.options import AsJson

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

    They are made by k2 launch --prefix-cache-disk.

    Example: k2 cache list
    """
    from k2cli.prefix_folder import stores
    from k2cli.ui.cache_view import print_stores, store_document
    from k2cli.ui.output import print_json

    found = stores()
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

    A run that uses one goes on, and computes its prompts again. Run it on each node of a cluster.

    Example: k2 cache clear --yes
    """
    import shlex

    from k2cli.errors import K2Error
    from k2cli.prefix_folder import remove_secret, remove_store, stores
    from k2cli.ui.cache_view import print_stores, store_document
    from k2cli.ui.output import note, print_json, print_line
    from k2cli.units import format_bytes

    found = stores()
    if model is not None:
        found = [store for store in found if store.model == model]
        if not found:
            raise K2Error(f"no cache of model '{model}' is on this disk", "k2 cache list")
    total = sum(store.nbytes for store in found)
    if found:
        if not json:
            print_stores(found)
        used = sum(store.in_use for store in found)
        also = f" ({used} of them used by a run)" if used else ""
        option = f" --model {shlex.quote(model)}" if model is not None else ""
        confirm(f"remove this, {format_bytes(total)}{also}?", yes, f"k2 cache clear{option}")
    if model is None:  # first: a run whose store is removed asks for a new one
        remove_secret()
    for store in found:
        remove_store(store.folder)
    if json:
        removed = [store_document(store) for store in found]
        print_json({"schema_version": 1, "freed_bytes": total, "removed": removed})
    elif found:
        print_line(f"freed {format_bytes(total)}")
    else:
        note("no caches of prompts are on this disk")


for _name, _command in (("list", list_), ("clear", clear)):
    # Given in full, because typer would cut off a long line in the list of commands.
    _short = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    cache.command(_name, short_help=_short)(_command)
