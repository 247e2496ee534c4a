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

    Example: k2 download demo
    """
    if cluster is not None or plan is not None:
        from k2cli.commands.models.download_to import download_to_cluster

        alone: dict[str, Any] = {"--to": to, "--only": only, "--include": include}
        alone |= {"--exclude": exclude, "--limit-rate": limit_rate, "--xet": xet}
        alone |= {"--dry-run": dry_run, "--events": events}
        download_to_cluster(model, revision, cluster, plan, alone=alone, as_json=json)
        return
    from k2cli.commands.download_events import event_document, show_event
    from k2cli.errors import UsageError
    from k2cli.models.sources.download import fetch
    from k2cli.models.sources.selection import Selection, kinds_of
    from k2cli.ui.output import note, print_json, print_json_line, print_line, warn
    from k2cli.ui.progress import ByteProgress

    if events and not json:
        again = f"k2 download {shlex.quote(model)} --json --events"
        raise UsageError("--events is for --json", again)
    selection = Selection(kinds_of(only or ()), tuple(include or ()), tuple(exclude or ()))
    options = _transfer_options(limit_rate)
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
        print_json_line({"event": "result", **_document(fetched)})
        return
    if json:
        print_json(_document(fetched))
        return
    for line in _summary(fetched, dry_run, chosen=not selection.is_default):
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


def _transfer_options(limit_rate: str | None) -> Any:
    from k2cli.errors import UsageError
    from k2cli.models.sources.range_stream import DownloadOptions
    from k2cli.units import parse_bytes

    if limit_rate is None:
        return DownloadOptions()
    hint = "--limit-rate 50M"
    try:
        rate = parse_bytes(limit_rate.removesuffix("/s"))
    except UsageError as error:
        raise UsageError(f"--limit-rate {error}", hint) from None
    if rate < 1000:
        raise UsageError(f"--limit-rate '{limit_rate}' is below 1 kB per second", hint)
    return DownloadOptions(bytes_per_second=rate)


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


def _document(fetched: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": fetched.model,
        "path": None if fetched.path is None else str(fetched.path),
        "commit": fetched.commit,
        "stored_bytes": fetched.stored_bytes,
        "missing_bytes": fetched.missing_bytes,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "missing_bytes": file.missing_bytes}
            for file in fetched.files
        ],
        "was_there": fetched.was_there,
    }


def _summary(fetched: Any, dry_run: bool, *, chosen: bool) -> list[str]:
    """Return what to print; ``chosen`` if the user chose among the files."""
    from k2cli.units import format_bytes

    size = format_bytes(fetched.stored_bytes)
    if dry_run and not fetched.was_there:
        missing = [file for file in fetched.files if file.missing_bytes]
        lines = [f"  {file.missing_bytes:>17,}  {file.name}" for file in missing]
        target = f" into {fetched.path}" if fetched.path is not None else ""
        what = f"{fetched.model}, {size} of weights" if fetched.stored_bytes else fetched.model
        here = sum(file.nbytes for file in fetched.files) - fetched.missing_bytes
        count = f"{len(missing)} file{'s' if len(missing) != 1 else ''}"
        return [
            f"would download {what}{target}:",
            *lines,
            f"  {fetched.missing_bytes:>17,}  bytes in {count}",
            *([f"  {here:>17,}  bytes are here already"] if here else []),
            *_room(fetched.path, fetched.missing_bytes),
        ]
    state = "already " if fetched.was_there else ""
    if chosen:
        number = len(fetched.files)
        total = format_bytes(sum(file.nbytes for file in fetched.files))
        files = "1 chosen file is" if number == 1 else f"the {number} chosen files are"
        return [f"{fetched.model}: {files} {state}in {fetched.path} ({total})"]
    return [f"{fetched.model} is {state}at {fetched.path} ({size} of weights)"]


def _room(folder: Path | None, needed_bytes: int) -> list[str]:
    """Say how much is free on the volume of a folder, and whether that is enough."""
    import shutil

    from k2cli.units import format_bytes

    if folder is None:
        return []
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
    except OSError:
        return []
    lack = "" if free >= needed_bytes else f", {format_bytes(needed_bytes - free)} too few"
    return [f"  {free:>17,}  bytes are free there{lack}"]
