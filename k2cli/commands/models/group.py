"""Commands ``k2 models ...``: models on this machine, and bringing them to others."""

from __future__ import annotations

from collections.abc import Callable

import typer

from k2cli.commands.models.list import list_models
from k2cli.commands.models.path import path
from k2cli.commands.models.prune import prune
from k2cli.commands.models.push import push
from k2cli.commands.models.remove import remove
from k2cli.commands.models.show import show
from k2cli.commands.models.verify import verify

_HELP = "List, verify and remove models, and bring them to other machines."

models = typer.Typer(
    name="models",
    help=_HELP,
    short_help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("list", list_models),
    ("show", show),
    ("verify", verify),
    ("path", path),
    ("push", push),
    ("remove", remove),
    ("prune", prune),
)
for _name, _command in _COMMANDS:
    # Given in full, because typer would cut off a long line in the list of commands.
    _short = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    models.command(_name, short_help=_short)(_command)
