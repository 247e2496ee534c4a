"""Command ``k2 doctor``: check that machines can run a model together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.choices import CheckedTransport, Parallel
from k2cli.commands.options import context_tokens
from k2cli.errors import UsageError

if TYPE_CHECKING:
    from k2cli.doctor.examination import ExaminationOptions, Report
    from k2cli.nodes.node import Node


def _most_tokens(text: str) -> int:
    count = context_tokens(text, "--most-tokens")
    if count == 0:
        raise UsageError("--most-tokens 0 leaves no prompt", "leave out --most-tokens")
    return count


def doctor(
    cluster: Annotated[
        str | None,
        typer.Argument(
            metavar="CLUSTER", help="Name of a cluster; not needed if there is only one."
        ),
    ] = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="A,B", help="SSH names of machines, instead of a cluster.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only the checks that precede every launch.")
    ] = False,
    transport: Annotated[
        CheckedTransport,
        typer.Option(
            "--backend", help="Transport to check for; an unmet requirement is then a failure."
        ),
    ] = "auto",
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check for a plan saved by plan-memory.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the model on the nodes. With --deep: the model to compute with, as for "
            "launch; by default a small one that k2 makes.",
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also start ranks on all nodes and compare what they send, with longer and longer "
            "prompts.",
        ),
    ] = False,
    most_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", parser=_most_tokens, help="The longest prompt of --deep. Default: 8k."
        ),
    ] = None,
    parallel: Annotated[
        Parallel | None,
        typer.Option(help="Placement of --deep. Default: tensor; with --model as for launch."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save the findings, without names and addresses."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Check a recording instead of machines.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check access, versions, memory, disks, sleep, links and RDMA of nodes, and print remedies.

    Changes nothing on the nodes; --deep makes a small model there, and removes it. Exits with 5
    if a check fails, and with 0 if all pass or warn.

    Example: k2 doctor --nodes localhost,studio2
    """
    from k2cli.errors import ClusterError
    from k2cli.ui.doctor_view import print_report, report_document
    from k2cli.ui.output import note, print_json

    if not deep and (most_tokens is not None or parallel is not None):
        option = "--most-tokens" if most_tokens is not None else "--parallel"
        raise UsageError(f"{option} is for --deep alone", "k2 doctor --deep")
    if deep:
        from k2cli.commands.deep_check import DeepOptions, deep_check, rank_names

        wanted = DeepOptions(cluster, nodes, transport, parallel, model, most_tokens)
    if replay is not None:
        report = _replayed(replay, cluster, nodes, deep=deep)
    else:
        if deep:
            rank_names(wanted)  # refuses what is wrong before minutes of measurements
        options = _options(quick, transport, plan, None if deep else model)
        report = _examined(_nodes(cluster, nodes), options)
    if deep:
        result = deep_check(wanted, possible=not report.failed)
        report = dataclasses.replace(report, results=(*report.results, result))
    if json:
        print_json(report_document(report))
    else:
        print_report(report)
    if record is not None:
        from k2cli.doctor.recording import record as write_recording

        note(f"recorded in {write_recording(report, record).parent}; look at it before sending it")
    if report.failed:
        raise typer.Exit(ClusterError.exit_code)


def _replayed(folder: Path, cluster: str | None, nodes: str | None, *, deep: bool) -> Report:
    from k2cli.doctor.recording import replay
    from k2cli.errors import UsageError

    if cluster is not None or nodes is not None:
        raise UsageError(
            f"--replay reads nodes from the recording, so '{cluster or nodes}' cannot be given",
            f"k2 doctor --replay {folder}",
        )
    if deep:
        raise UsageError(
            "--deep starts ranks on nodes, and --replay has none", f"k2 doctor --replay {folder}"
        )
    return replay(folder)


def _options(
    quick: bool, transport: CheckedTransport, plan: Path | None, model: str | None
) -> ExaminationOptions:
    from k2cli.doctor.examination import ExaminationOptions
    from k2cli.planning.plan import read_plan

    read = read_plan(plan) if plan is not None else None
    return ExaminationOptions(quick=quick, transport=transport, model_folder=model, plan=read)


def _examined(nodes: list[Node], options: ExaminationOptions) -> Report:
    from k2cli.doctor.examination import examine_nodes
    from k2cli.ui.output import note

    return examine_nodes(nodes, options, tell=note)


def _nodes(cluster: str | None, nodes: str | None) -> list[Node]:
    from k2cli.cluster.description import list_clusters
    from k2cli.cluster.node_lookup import chosen_nodes
    from k2cli.nodes.local import LocalNode

    if cluster is None and nodes is None and not list_clusters():
        return [LocalNode()]
    return chosen_nodes(cluster, nodes)[1]
