"""Command ``k2 models path``: print the folder of a model."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Alias, owner/name[@revision] or folder.")
]


def path(model: ModelArgument) -> None:
    """Print the folder of a model on this machine; exit 1 if it is not here or not complete.

    Example: k2 models path demo
    """
    from k2cli.models.inventory.find import complete_folder
    from k2cli.ui.output import print_line

    print_line(str(complete_folder(model)))
