"""``k2 download --cluster``: download a model once, and bring it to the nodes of a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2cli.errors import UsageError
    from k2cli.transfer.shares import NodeShare


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of a download that also hold for one that goes to a cluster."""

    revision: str | None = None
    only: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    limit_rate: str | None = None
    dry_run: bool = False

    @property
    def options(self) -> list[str]:
        """The options of a command that continues the download."""
        pairs = [("--revision", self.revision), ("--limit-rate", self.limit_rate)]
        for name, values in (
            ("--only", self.only), ("--include", self.include), ("--exclude", self.exclude)
        ):  # fmt: skip
            pairs += [(name, value) for value in values]
        return [word for name, value in pairs if value is not None for word in (name, value)]


def download_to_cluster(
    model: str,
    cluster: str | None,
    plan: Path | None,
    wishes: Wishes,
    *,
    alone: Mapping[str, object],
    as_json: bool,
) -> None:
    """Download a model to this machine and to the nodes of a cluster.

    ``alone`` are the values of options that are for a download to this machine alone.
    """
    from k2cli.cluster.description import load_cluster
    from k2cli.commands.download_summary import transfer_options
    from k2cli.commands.models.push import push_document, run_push, show_results
    from k2cli.errors import UsageError
    from k2cli.models.sources.selection import Selection, kinds_of
    from k2cli.transfer.choose_download import choose_download
    from k2cli.transfer.choose_push import choose_push
    from k2cli.ui.output import print_json

    if cluster is None:
        raise UsageError("--plan divides a model among the nodes of a cluster", "--cluster NAME")
    if given := [option for option, value in alone.items() if value]:
        raise _refused(given[0], model, cluster, alone[given[0]])
    load_cluster(cluster)  # a wrong name is refused before anything is fetched
    selection = Selection(kinds_of(wishes.only), tuple(wishes.include), tuple(wishes.exclude))
    options = transfer_options(wishes.limit_rate)
    words = [*wishes.options, "--cluster", cluster, *(["--plan", str(plan)] if plan else [])]
    resume = shlex.join(["k2", "download", model, *words])
    chosen = choose_download(model, wishes.revision, cluster, plan, selection, options)
    if chosen is None and not selection.is_default:
        raise UsageError(
            f"files can be chosen only of a repository of the Hub; '{model}' goes to the nodes as "
            "a whole",
            "leave --only, --include and --exclude out",
        )
    if wishes.dry_run:
        _show_dry_run(model, wishes.revision, selection, chosen, cluster, as_json=as_json)
        return
    if chosen is not None:
        request, feed = chosen.request, chosen.feed
        results = run_push(request, feed, resume)
    else:
        _fetch_here(model, options, resume)
        request = choose_push(model, [], cluster_name=cluster, plan_file=plan)
        results = run_push(request, None, resume)
    if as_json:
        print_json(push_document(request, results))
    else:
        show_results(results)


def _refused(option: str, model: str, cluster: str, value: object) -> UsageError:
    """Return the error for an option that is for this machine alone, and what to run instead."""
    from k2cli.errors import UsageError

    hint = f"leave {option} out"
    if option != "--events":
        here = ["k2", "download", model, option]
        here += [str(value)] if option == "--to" else []
        sent = str(Path(str(value)).absolute()) if option == "--to" else model
        push = ["k2", "models", "push", sent, "--cluster", cluster]
        hint = f"{shlex.join(here)} && {shlex.join(push)}"
    return UsageError(f"{option} is for a download to this machine, without --cluster", hint)


def _fetch_here(model: str, options: Any, resume: str) -> None:
    """Fetch a model that is not of the Hub to this machine, with progress."""
    from k2cli.commands.download_events import show_event
    from k2cli.models.sources.download import fetch
    from k2cli.ui.output import note
    from k2cli.ui.progress import ByteProgress

    try:
        with ByteProgress() as progress:
            fetch(model, options=options, on_event=lambda event: show_event(event, progress))
    except KeyboardInterrupt:
        note(f"\ninterrupted; to continue: {resume}")
        raise


# --- what would be done -------------------------------------------------------------------------


def _show_dry_run(
    model: str,
    revision: str | None,
    selection: Any,
    chosen: Any,
    cluster: str,
    *,
    as_json: bool,
) -> None:
    """Print what this machine would download, and what each node would get."""
    from k2cli.cluster.description import load_cluster
    from k2cli.commands.download_summary import download_document, download_summary
    from k2cli.models.sources.download import fetch
    from k2cli.transfer.shares import shares_of_nodes
    from k2cli.ui.output import print_json, print_line

    fetched = fetch(
        model, revision=revision, dry_run=True, selection=selection, on_event=lambda event: None
    )
    shares: list[NodeShare] = shares_of_nodes(chosen.request) if chosen is not None else []
    if as_json:
        print_json({**download_document(fetched), "nodes": [_share_document(s) for s in shares]})
        return
    for line in download_summary(fetched, True, chosen=not selection.is_default):
        print_line(line)
    for share in shares:
        print_line(_share_line(share))
    if chosen is None:
        names = ", ".join(node.name for node in load_cluster(cluster).nodes)
        print_line(f"after that, the model would be pushed to those of {names} that lack it")


def _share_line(share: NodeShare) -> str:
    from k2cli.units import format_bytes

    lacking = [file for file in share.files if file.missing_bytes]
    missing = sum(file.missing_bytes for file in lacking)
    total = sum(file.nbytes for file in share.files)
    count = f"{len(share.files)} file{'s' if len(share.files) != 1 else ''}"
    if not lacking:
        return f"{share.node}: has all of its {count} already"
    rest = "" if missing == total else f"; it lacks {format_bytes(missing)} of that"
    asked = f" (it could not be asked: {share.problem})" if share.problem else ""
    return f"{share.node}: would get {count}, {format_bytes(total)}{rest}{asked}"


def _share_document(share: NodeShare) -> dict[str, Any]:
    return {
        "node": share.node,
        "problem": share.problem,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "missing_bytes": file.missing_bytes}
            for file in share.files
        ],
    }
