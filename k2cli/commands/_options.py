"""Arguments and options that several commands take in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

ClusterName = Annotated[
    str | None,
    typer.Argument(metavar="CLUSTER", help="The cluster; not needed if there is only one."),
]
NodeNames = Annotated[
    str | None,
    typer.Option("--nodes", metavar="A,B", help="These machines instead of a cluster."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
