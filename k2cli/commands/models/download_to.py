"""``k2 download --cluster``: download a model once, and bring it to the nodes of a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path


def download_to_cluster(
    model: str,
    revision: str | None,
    cluster: str | None,
    plan: Path | None,
    *,
    alone: Mapping[str, object],
    as_json: bool,
) -> None:
    """Download a model to this machine and to the nodes of a cluster.

    ``alone`` are the values of options that are for a download to this machine alone.
    """
    from k2cli.cluster.description import load_cluster
    from k2cli.commands.models.push import push_document, run_push, show_results
    from k2cli.errors import UsageError
    from k2cli.transfer.choose_download import choose_download
    from k2cli.transfer.choose_push import choose_push
    from k2cli.ui.output import print_json

    if cluster is None:
        raise UsageError("--plan divides a model among the nodes of a cluster", "--cluster NAME")
    if given := [option for option, value in alone.items() if value]:
        raise UsageError(f"{given[0]} cannot be used with --cluster", f"leave out {given[0]}")
    load_cluster(cluster)  # a wrong name is refused before anything is fetched
    options = [] if revision is None else ["--revision", revision]
    options += ["--cluster", cluster, *(["--plan", str(plan)] if plan else [])]
    resume = shlex.join(["k2", "download", model, *options])
    if (chosen := choose_download(model, revision, cluster, plan)) is not None:
        request, feed = chosen
        results = run_push(request, feed, resume)
    else:
        _fetch_here(model, resume)
        request = choose_push(model, [], cluster_name=cluster, plan_file=plan)
        results = run_push(request, None, resume)
    if as_json:
        print_json(push_document(request, results))
    else:
        show_results(results)


def _fetch_here(model: str, resume: str) -> None:
    """Fetch a model that is not of the Hub to this machine, with progress."""
    from k2cli.commands.download_events import show_event
    from k2cli.models.sources.download import fetch
    from k2cli.ui.output import note
    from k2cli.ui.progress import ByteProgress

    try:
        with ByteProgress() as progress:
            fetch(model, on_event=lambda event: show_event(event, progress))
    except KeyboardInterrupt:
        note(f"\ninterrupted; to continue: {resume}")
        raise
