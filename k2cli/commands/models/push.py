"""Command ``k2 models push``: bring a model from one machine to others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.commands.options import AsJson
from k2cli.transfer.ways import Over

if TYPE_CHECKING:
    from k2cli.transfer.feed import Feed
    from k2cli.transfer.request import NodeResult, OnPushEvent, PushRequest


def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, owner/name[@revision] or folder.")
    ],
    nodes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NODE...", help="SSH names; default: all of cluster or plan."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Cluster whose nodes get it, over its links."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Send each node only the files that its ranks read."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NODE",
            help="Node that sends. Default: this machine, or else the first that has the model.",
        ),
    ] = None,
    over: Annotated[
        Over,
        typer.Option(help="Way of the data. copy: by rsync or scp. auto: the first that works."),
    ] = "auto",
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace files of the same name with another content."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Bring a model to other machines, with progress; a repeated push sends what is missing.

    The source sends each byte once, and each node passes complete files on to the next one. Data
    are encrypted, and hashed at both ends. Each machine keeps the model where its own k2 finds it.

    Example: k2 models push demo studio-2
    """
    from k2cli.transfer.choose_push import choose_push
    from k2cli.ui.output import print_json

    request = choose_push(
        model,
        nodes or [],
        cluster_name=cluster,
        plan_file=plan,
        source=source,
        over=over,
        replace=replace,
    )
    results = run_push(request)
    if json:
        print_json(push_document(request, results))
    else:
        show_results(results)


def run_push(
    request: PushRequest, feed: Feed | None = None, resume: str | None = None
) -> list[NodeResult]:
    """Bring a model to nodes with progress on stderr; after Ctrl-C, say how to continue."""
    from k2cli.transfer.push import push as push_to_nodes
    from k2cli.transfer.push import resume_command

    with push_progress(resume or resume_command(request)) as show:
        return push_to_nodes(request, show, feed)


@contextlib.contextmanager
def push_progress(resume: str) -> Iterator[OnPushEvent]:
    """Show progress on stderr while the block runs; after Ctrl-C, say what continues it."""
    from k2cli.transfer.request import PushBytes, PushStep
    from k2cli.ui.output import note
    from k2cli.ui.progress import ByteProgress

    def show(event: PushStep | PushBytes) -> None:
        if isinstance(event, PushStep):
            progress.step(event.text)
        else:
            progress.advance(event.done_bytes, event.total_bytes)

    try:
        with ByteProgress() as progress:
            yield show
    except KeyboardInterrupt:
        note(f"\nwhat has arrived is kept; to continue: {resume}")
        raise


def show_results(results: list[NodeResult]) -> None:
    """Print where the model is on each node, and how fast it came."""
    from k2cli.ui.output import print_line
    from k2cli.units import format_bytes, format_duration, format_rate

    if not results:
        print_line("all nodes have it already")
    for result in results:
        if result.sent_bytes:
            rate = format_rate(result.sent_bytes, result.seconds)
            took = f"{format_bytes(result.sent_bytes)} in {format_duration(result.seconds)}"
            how = f", {took} ({rate}, {result.route})" if rate else f", {took} ({result.route})"
        else:
            how = ", which had it already"
        print_line(f"{result.node}: {result.folder}{how}")


def push_document(request: PushRequest, results: list[NodeResult]) -> dict[str, Any]:
    """Return the result of a push as a document."""
    return {
        "schema_version": 1,
        "model": request.reference,
        "source": request.source.name,
        "nodes": [
            {
                "node": result.node,
                "path": result.folder,
                "sent_bytes": result.sent_bytes,
                "was_there_bytes": result.was_there_bytes,
                "seconds": round(result.seconds, 3),
                "route": result.route,
                "sender_cpu_seconds": round(result.sender_cpu_seconds, 3),
                "receiver_cpu_seconds": round(result.receiver_cpu_seconds, 3),
            }
            for result in results
        ],
    }
