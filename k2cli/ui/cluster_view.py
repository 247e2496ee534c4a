"""Text views of clusters: machines, links, running runs, preparation and cleaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from k2cli.ui.output import note, print_line, print_text, warn
from k2cli.units import format_bytes, format_gib, one_line

if TYPE_CHECKING:
    from k2cli.agent.activity import RunActivity
    from k2cli.agent.clean import Cleared
    from k2cli.agent.locks import Lock
    from k2cli.cluster.description import Cluster, ClusterNode, Link
    from k2cli.cluster.discovery import NodeActivity, NodeAnswer
    from k2cli.nodes.install import InstallStep, Prepared
    from k2cli.runs.clean import CleanReport


def print_cleaning(reports: Sequence[CleanReport]) -> None:
    """Print the processes ended, files removed and live runs spared on each machine."""
    for report in reports:
        if report.problem:
            print_line(f"{report.node}: {report.problem}")
        for run in report.cleared:
            print_line(f"{report.node}: {run.run_id}: {_cleared(run)}")
            for process in run.remaining:
                print_line(f"  could not be ended: {process}")
        for run_id in report.spared:
            print_line(f"{report.node}: {run_id} lives, and was left alone")
        if not (report.problem or report.cleared or report.spared):
            print_line(f"{report.node}: nothing was left")


def _cleared(run: Cleared) -> str:
    done = [f"ended {run.ended_processes} processes"] if run.ended_processes else []
    removed = [what for what, is_so in _removed(run) if is_so]
    done += [f"removed {' and '.join(removed)}"] if removed else []
    return ", ".join(done) or "nothing could be done"


def _removed(run: Cleared) -> list[tuple[str, bool]]:
    return [("its lock", run.removed_lock), ("its files", run.removed_files)]


def show_step(step: InstallStep) -> None:
    """Print a line on stderr when a step of preparing a machine begins."""
    note(one_line(f"{step.node}: {step.text}"))


def show_prepared(result: Prepared) -> None:
    """Print on stderr that a machine is ready, or the reason that it is not."""
    note(one_line(f"{result.node}: {result.status}: {result.detail}"))
    if result.hint:
        note(one_line(f"  hint: {result.hint}"))


def show_answer(answer: NodeAnswer) -> None:
    """Print on stderr the facts of a machine that answered, and warn if k2 is missing there."""
    if answer.facts is not None:
        facts = answer.facts
        size = f"{format_gib(facts.memory_bytes)} of memory"
        limit = format_gib(facts.limit_bytes)
        note(one_line(f"{answer.name}: {facts.chip}, {size}, MLX may use {limit}"))
    if answer.problem and answer.facts is not None:
        warn(f"{answer.problem}; {answer.hint}" if answer.hint else answer.problem)


def print_cluster(
    cluster: Cluster,
    activities: Mapping[str, NodeActivity] | None = None,
    problems: Mapping[str, str] | None = None,
) -> None:
    """Print a cluster: a block per machine, with its links to the machines after it.

    Args:
        cluster: the cluster.
        activities: runs and locks by node, without the nodes that did not answer.
        problems: by node, the reason that it did not answer.
    """
    known = [node for node in cluster.nodes if node.memory_bytes]
    total = sum(node.limit_bytes for node in known)
    count = f"{len(cluster.nodes)} node{'s' if len(cluster.nodes) != 1 else ''}"
    if len(cluster.rank_nodes) != len(cluster.nodes):
        count += f" with {len(cluster.rank_nodes)} ranks"
    memory = f"MLX may use {format_gib(total)} in all" if known else "memory not known yet"
    print_line(f"{cluster.name}: {count}, {memory}")
    for index, node in enumerate(cluster.nodes):
        print_text()
        print_line(f"● {_title(node)}")
        for line in _details(node, activities, problems):
            print_line(f"│ {line}")
        for link in cluster.links:
            if link.first == node.name:
                print_line(f"├─ {_link(link)}")
        if index == len(cluster.nodes) - 1 and len(cluster.nodes) > 1 and not cluster.links:
            print_text()
            print_text("no network is known that joins these machines")


def _title(node: ClusterNode) -> str:
    return node.name if node.hostname in ("", node.name) else f"{node.name} ({node.hostname})"


def _details(
    node: ClusterNode,
    activities: Mapping[str, NodeActivity] | None,
    problems: Mapping[str, str] | None,
) -> list[str]:
    if not node.memory_bytes:
        return ["not asked yet"]
    memory = (
        f"{format_gib(node.memory_bytes)} of memory, MLX may use {format_gib(node.limit_bytes)}"
    )
    bandwidth = node.bandwidth_bytes_per_second
    speed = f", reads {format_bytes(bandwidth)}/s" if bandwidth else ""
    lines = [f"{node.chip}, {node.os}", f"{memory} ({node.device}){speed}"]
    if node.gpus:
        lines.append(", ".join(gpu.name.label for gpu in node.gpus))
    if activities is None:
        return lines if node.python else [*lines, "this k2 is not installed there"]
    activity = activities.get(node.name)
    if activity is None:
        return [*lines, (problems or {}).get(node.name, "did not answer")]
    lines += [_lock(lock) for lock in activity.locks]
    lines += [_run(run) for run in activity.runs]
    return lines if activity.runs or activity.locks else [*lines, "nothing runs"]


def _lock(lock: Lock) -> str:
    claim = lock.claim
    state = "" if lock.state == "held" else f", {lock.state}: k2 cluster clean ends what is left"
    return f"taken by {claim.run_id} of {claim.user} from {claim.host}{state}"


def _run(run: RunActivity) -> str:
    return f"runs {run.run_id}: {run.processes} processes, {format_bytes(run.resident_bytes)}"


def _link(link: Link) -> str:
    kind = f"{link.kind}, RDMA" if link.rdma else link.kind
    here = " ".join(filter(None, [link.first_interface, link.first_address]))
    there = " ".join(filter(None, [link.second_interface, link.second_address]))
    return f"{kind}: {here} ── {there} → {link.second}"


def print_cluster_names(clusters: Sequence[Cluster]) -> None:
    """Print one line per cluster."""
    if not clusters:
        note("no clusters; describe your machines with: k2 cluster init HOST HOST --name NAME")
    for cluster in clusters:
        limit = format_gib(sum(node.limit_bytes for node in cluster.nodes))
        print_line(f"{cluster.name}  {', '.join(node.name for node in cluster.nodes)}  {limit}")
