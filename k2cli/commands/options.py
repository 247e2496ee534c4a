"""Arguments and options that several commands share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from k2cli import choices
from k2cli.errors import UsageError
from k2cli.units import one_line, parse_tokens


def context_tokens(text: str, option: str = "--context") -> int:
    """Parse a number of tokens, such as the value of ``--context``.

    Raises:
        UsageError: if the text is not a number of tokens.
    """
    try:
        return parse_tokens(text)
    except UsageError as error:
        raise UsageError(f"{option} {error.message}", f"{option} 4k") from error


def some_tokens(text: str, option: str) -> int:
    """Parse a number of tokens that is 1 or more.

    Raises:
        UsageError: if the text is not one.
    """
    count = context_tokens(text, option)
    if count < 1:
        raise UsageError(f"{option} {count} is too small: the minimum is 1", f"{option} 2k")
    return count


def _tokens_option(name: str, text: str) -> Any:
    """Return an option that takes a number of tokens, with its help."""
    parser = partial(some_tokens, option=name)
    return typer.Option(parser=parser, metavar="TOKENS", help=text)


def kv_bits(text: str) -> choices.KvBits:
    """Parse the value of ``--kv-bits``.

    Raises:
        UsageError: if the text is not one of the numbers.
    """
    if text == "8":
        return 8
    if text == "4":
        return 4
    raise UsageError(f"a KV cache is quantized to 8 or 4 bits, not '{one_line(text)}'", _KV_HINT)


_KV_HINT = "--kv-bits 8"

ClusterName = Annotated[
    str | None,
    typer.Argument(metavar="CLUSTER", help="Name of a cluster; not needed if there is only one."),
]
NodeNames = Annotated[
    str | None,
    typer.Option("--nodes", metavar="A,B", help="SSH names of machines, instead of a cluster."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Transport = Annotated[
    choices.WantedTransport,
    typer.Option(
        "--backend",
        help="Transport between ranks. auto: choose from the nodes and links; launch prints the "
        "reason.",
    ),
]
Parallel = Annotated[
    choices.Parallel,
    typer.Option(
        help="Division of the model. pipeline: some layers per rank; tensor: a slice of every "
        "layer per rank."
    ),
]
LinkCheck = Annotated[
    choices.WantedLinkCheck,
    typer.Option(
        help="Compute a prompt of 4,096 tokens twice before the run is ready, to see that data "
        "arrive right between ranks. auto: if ranks are on several nodes."
    ),
]
FloatType = Annotated[
    choices.WantedFloatType,
    typer.Option(
        help="Float type of activations and KV cache. auto: the model's; float32 on a CPU."
    ),
]
KvBits = Annotated[
    choices.KvBits | None,
    typer.Option(
        parser=kv_bits,
        metavar="8|4",
        help="Quantize the KV cache to so many bits, for models without latent attention: more "
        "context in the same memory. Default: not quantized.",
    ),
]
Head = Annotated[
    choices.Head,
    typer.Option(help="Output head in tensor parallelism. auto: sharded if the model allows it."),
]
Context = Annotated[
    int | None,
    typer.Option(
        parser=context_tokens,
        metavar="TOKENS",
        help="Tokens per sequence, such as 131072 or 128k. Default: the model's limit, at most "
        "32768; k2 launch takes the longest that fits.",
    ),
]
PromptTokens = Annotated[
    int | None,
    _tokens_option(
        "--prompt-tokens",
        "Prompt of the request by whose time placements are compared, such as 60k. Default: 2000.",
    ),
]
AnswerTokens = Annotated[
    int | None,
    _tokens_option("--answer-tokens", "Answer of that request. Default: 500."),
]
MaxTokens = Annotated[
    int | None,
    _tokens_option("--max-tokens", "Longest answer, such as 256 or 4k."),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sequences processed at the same time. Default: 1 for plan-memory; for launch, as "
        "many as fit, at most 8.",
    ),
]
