"""Command ``k2 download``: put a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def download(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, owner/name[@revision] or .gguf file.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Folder to put the model in.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be downloaded, and stop.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Cluster whose nodes get the model from this machine."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Send each node only the files that its ranks read."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a model, and convert it for MLX if it is a GGUF file.

    Only the files that loading reads are downloaded (weights, config, tokenizer, templates), never
    code. Files that are already on this machine are not downloaded again, unless they are damaged.

    Example: k2 download demo
    """
    if cluster is not None or plan is not None:
        from k2cli.commands.models.download_to import download_to_cluster

        download_to_cluster(model, revision, cluster, plan, alone=to or dry_run, as_json=json)
        return
    from k2cli.models.sources.download import BytesDone, Event, StepStarted, fetch
    from k2cli.ui.output import note, print_json, print_line
    from k2cli.ui.progress import ByteProgress

    with ByteProgress() as progress:

        def show(event: Event) -> None:
            if isinstance(event, StepStarted):
                progress.step(event.text)
            elif isinstance(event, BytesDone):
                progress.advance(event.done_bytes, event.total_bytes)

        fetched = fetch(model, destination=to, revision=revision, dry_run=dry_run, on_event=show)
    if json:
        print_json(_document(fetched))
        return
    for line in _summary(fetched, dry_run):
        print_line(line)
    if not dry_run:
        name = str(to) if to is not None else model
        note(f"\nnext: k2 plan-memory {name} --hardware '2x m3-ultra-512'")
        note(f"      k2 launch {name}")


def _document(fetched: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": fetched.model,
        "path": None if fetched.path is None else str(fetched.path),
        "stored_bytes": fetched.stored_bytes,
        "files": [{"name": file.name, "bytes": file.nbytes} for file in fetched.files],
        "was_there": fetched.was_there,
    }


def _summary(fetched: Any, dry_run: bool) -> list[str]:
    from k2cli.units import format_bytes

    size = format_bytes(fetched.stored_bytes)
    if dry_run and not fetched.was_there:
        lines = [f"  {format_bytes(file.nbytes):>9}  {file.name}" for file in fetched.files]
        target = f" into {fetched.path}" if fetched.path is not None else ""
        return [f"would download {fetched.model}, {size} of weights{target}:", *lines]
    state = "is already at" if fetched.was_there else "is at"
    return [f"{fetched.model} {state} {fetched.path} ({size} of weights)"]
