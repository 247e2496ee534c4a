"""Arguments and options that several commands take in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

from k2cli.errors import UsageError
from k2cli.units import parse_tokens


def context_tokens(text: str) -> int:
    """What ``--context`` was given.

    Raises:
        UsageError: if it is no number of tokens.
    """
    try:
        return parse_tokens(text)
    except UsageError as error:
        raise UsageError(f"--context {error.message}", error.hint) from error


ClusterName = Annotated[
    str | None,
    typer.Argument(metavar="CLUSTER", help="The cluster; not needed if there is only one."),
]
NodeNames = Annotated[
    str | None,
    typer.Option("--nodes", metavar="A,B", help="These machines instead of a cluster."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
