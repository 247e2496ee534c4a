"""``k2 download --cluster``: download a model once, and bring it to the nodes of a cluster."""

from __future__ import annotations

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
    from k2cli.commands.models.push import push_document, run_push, show_results
    from k2cli.errors import UsageError
    from k2cli.models.sources.download import fetch
    from k2cli.transfer.choose_download import choose_download
    from k2cli.transfer.choose_push import choose_push
    from k2cli.ui.output import note, print_json

    if cluster is None:
        raise UsageError("--plan divides a model among the nodes of a cluster", "--cluster NAME")
    if given := [option for option, value in alone.items() if value]:
        raise UsageError(f"{given[0]} cannot be used with --cluster", f"leave out {given[0]}")
    resume = f"k2 download {model} --cluster {cluster}" + (f" --plan {plan}" if plan else "")
    if (chosen := choose_download(model, revision, cluster, plan)) is not None:
        request, feed = chosen
        results = run_push(request, feed, resume)
    else:
        note(f"fetching {model}")
        fetch(model)
        request = choose_push(model, [], cluster_name=cluster, plan_file=plan)
        results = run_push(request, None, resume)
    if as_json:
        print_json(push_document(request, results))
    else:
        show_results(results)
