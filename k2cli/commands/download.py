"""Command ``k2 download``: put a model on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def download(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Alias, owner/name[@revision] or .gguf file."),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Folder to put the model in.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="KIND", help="config, tokenizer or weights alone; repeatable."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Download the repository's files with such names instead; repeatable.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", metavar="PATTERN", help="Leave out files with such names; repeatable."
        ),
    ] = None,
    limit_rate: Annotated[
        str | None,
        typer.Option(
            "--limit-rate", metavar="SIZE", help="Most bytes per second in all, such as 50M."
        ),
    ] = None,
    xet: Annotated[
        bool,
        typer.Option(
            "--xet", help="Leave the transfer to the Hub library's Xet (not tried by k2)."
        ),
    ] = False,
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
    events: Annotated[
        bool,
        typer.Option("--events", help="With --json: also print progress, one JSON line each."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a model, and convert it for MLX if it is a GGUF file.

    Only the files that loading reads are downloaded (weights, config, tokenizer, templates), never
    code. Each file is verified by its hash. An interrupted download continues where it was, and
    files that are already on this machine are not downloaded again, unless they are damaged.

    A model of ModelScope is modelscope:owner/name[@revision].

    With --cluster, each file of a repository of the Hub is passed on as soon as it is here. Any
    other model, such as one of ModelScope, is downloaded first, and pushed after that.

    Example: k2 download demo
    """
    if cluster is not None or plan is not None:
        from k2cli.commands.models.download_to import Wishes, download_to_cluster

        wishes = Wishes(revision, only or [], include or [], exclude or [], limit_rate, dry_run)
        alone = {"--to": to, "--xet": xet, "--events": events}
        download_to_cluster(model, cluster, plan, wishes, alone=alone, as_json=json)
        return
    from k2cli.commands.download_events import event_document, show_event
    from k2cli.commands.download_summary import (
        download_document,
        download_summary,
        transfer_options,
    )
    from k2cli.errors import UsageError
    from k2cli.models.sources.download import fetch
    from k2cli.models.sources.selection import Selection, kinds_of
    from k2cli.ui.output import note, print_json, print_json_line, print_line, warn
    from k2cli.ui.progress import ByteProgress

    if events and not json:
        again = f"k2 download {shlex.quote(model)} --json --events"
        raise UsageError("--events is for --json", again)
    selection = Selection(kinds_of(only or ()), tuple(include or ()), tuple(exclude or ()))
    options = transfer_options(limit_rate)
    as_lines = json and events
    try:
        with ByteProgress() as progress:

            def show(event: Any) -> None:
                show_event(event, progress)
                if as_lines:
                    print_json_line(event_document(event))

            fetched = fetch(
                model,
                destination=to,
                revision=revision,
                dry_run=dry_run,
                selection=selection,
                options=options,
                xet=xet,
                on_event=show,
            )
    except KeyboardInterrupt:
        command = _command(model, to, revision, selection, limit_rate, xet)
        note(f"\ninterrupted; to continue: {command}")
        raise
    for warning in fetched.warnings:
        warn(warning)
    if as_lines:
        print_json_line({"event": "result", **download_document(fetched)})
        return
    if json:
        print_json(download_document(fetched))
        return
    for line in download_summary(fetched, dry_run, chosen=not selection.is_default):
        print_line(line)
    if not dry_run and selection.is_default:
        name = shlex.quote(_name_of(model, to, revision))
        note(f"\nnext: k2 plan-memory {name} --hardware '2x m3-ultra-512'")
        note(f"      k2 launch {name}")


def _name_of(model: str, to: Path | None, revision: str | None) -> str:
    """Return what a user types for what was downloaded."""
    if to is not None:
        # A relative path without a separator may be read as a name.
        return str(to) if to.is_absolute() else f"./{to}"
    if revision is None:
        return model
    from k2cli.models.reference import MODELSCOPE, parse_reference

    reference = parse_reference(model)
    repo = reference.repo or f"{MODELSCOPE}{reference.modelscope_repo}"
    return f"{repo}@{revision}"


def _command(
    model: str,
    to: Path | None,
    revision: str | None,
    selection: Any,
    limit_rate: str | None,
    xet: bool,
) -> str:
    """Return the command line that continues this download."""
    options: list[tuple[str, str]] = [
        *(("--to", str(value)) for value in [to] if value is not None),
        *(("--revision", value) for value in [revision] if value is not None),
        *(("--only", value) for value in selection.only),
        *(("--include", value) for value in selection.include),
        *(("--exclude", value) for value in selection.exclude),
        *(("--limit-rate", value) for value in [limit_rate] if value is not None),
    ]
    flags = ["--xet"] if xet else []
    words = [word for pair in options for word in pair]
    return shlex.join(["k2", "download", model, *words, *flags])
