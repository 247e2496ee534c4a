"""Commands ``k2 models ...``: what models are on which machine, and bringing them to others."""

from __future__ import annotations

import typer

from k2cli.commands.models.push import push

_HELP = "Bring models to other machines."

models = typer.Typer(
    name="models",
    help=_HELP,
    short_help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@models.callback()
def _group() -> None:
    """Bring models to other machines."""


models.command("push")(push)
