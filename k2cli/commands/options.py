"""Arguments and options that several commands take in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

from k2cli import choices
from k2cli.errors import UsageError
from k2cli.units import parse_tokens


def context_tokens(text: str) -> int:
    """Parse the value of ``--context``.

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

Transport = Annotated[
    choices.WantedTransport,
    typer.Option(
        "--backend",
        help="What connects the ranks. auto: choose from links and nodes; launch says why.",
    ),
]
Parallel = Annotated[choices.Parallel, typer.Option(help="How to divide the model.")]
FloatType = Annotated[
    choices.WantedFloatType,
    typer.Option(help="Float type of activations and cache; auto: the model's, float32 on a CPU."),
]
Head = Annotated[
    choices.Head,
    typer.Option(help="Output head of tensor slices; auto: sharded where it can be."),
]
Context = Annotated[
    int | None,
    typer.Option(
        parser=context_tokens,
        metavar="TOKENS",
        help="Tokens per sequence, as 131072 or 128k. Default: the model's, at most 32768.",
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sequences held at a time. Default: 1; k2 launch: what fits, at most 8.",
    ),
]
