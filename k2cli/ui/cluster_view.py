"""A cluster as text: its machines, the links between them, and what runs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from k2cli.ui.output import note, print_text, warn
from k2cli.units import format_bytes, format_gib


class NodeView(Protocol):
    """One machine."""

    @property
    def name(self) -> str: ...
    @property
    def hostname(self) -> str: ...
    @property
    def os(self) -> str: ...
    @property
    def chip(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def python(self) -> str | None: ...
    @property
    def bandwidth_bytes_per_second(self) -> int | None: ...


class LinkView(Protocol):
    """One link."""

    @property
    def first(self) -> str: ...
    @property
    def second(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def first_interface(self) -> str: ...
    @property
    def first_address(self) -> str | None: ...
    @property
    def second_interface(self) -> str: ...
    @property
    def second_address(self) -> str | None: ...
    @property
    def rdma(self) -> bool: ...


class ClusterView(Protocol):
    """A cluster."""

    @property
    def name(self) -> str: ...
    @property
    def nodes(self) -> Sequence[NodeView]: ...
    @property
    def links(self) -> Sequence[LinkView]: ...


class RunView(Protocol):
    """A run on a machine."""

    @property
    def run_id(self) -> str: ...
    @property
    def processes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...


class ClaimView(Protocol):
    """Whose a lock is."""

    @property
    def run_id(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def host(self) -> str: ...


class LockView(Protocol):
    """A lock, and what it is worth."""

    @property
    def claim(self) -> ClaimView: ...
    @property
    def state(self) -> str: ...


class ActivityView(Protocol):
    """What runs on a machine, and who has it."""

    @property
    def runs(self) -> Sequence[RunView]: ...
    @property
    def locks(self) -> Sequence[LockView]: ...


class FactsView(Protocol):
    """What a machine says of itself."""

    @property
    def chip(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int: ...


class AnswerView(Protocol):
    """A machine's answer, or why there is none."""

    @property
    def name(self) -> str: ...
    @property
    def facts(self) -> FactsView | None: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def hint(self) -> str | None: ...


class StepView(Protocol):
    """Something begins on a machine."""

    @property
    def node(self) -> str: ...
    @property
    def text(self) -> str: ...


class PreparedView(Protocol):
    """What became of a machine."""

    @property
    def node(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def hint(self) -> str | None: ...


class ClearedView(Protocol):
    """What was left of a run."""

    @property
    def run_id(self) -> str: ...
    @property
    def ended_processes(self) -> int: ...
    @property
    def remaining(self) -> Sequence[str]: ...
    @property
    def removed_lock(self) -> bool: ...
    @property
    def removed_files(self) -> bool: ...


class CleanView(Protocol):
    """What was done on a machine."""

    @property
    def node(self) -> str: ...
    @property
    def cleared(self) -> Sequence[ClearedView]: ...
    @property
    def spared(self) -> Sequence[str]: ...
    @property
    def problem(self) -> str: ...


def print_cleaning(reports: Sequence[CleanView]) -> None:
    """What was ended and removed on each machine, what was not, and what lives there."""
    for report in reports:
        if report.problem:
            print_text(f"{report.node}: {report.problem}")
        for run in report.cleared:
            print_text(f"{report.node}: {run.run_id}: {_cleared(run)}")
            for process in run.remaining:
                print_text(f"  could not be ended: {process}")
        for run_id in report.spared:
            print_text(f"{report.node}: {run_id} lives, and was left alone")
        if not (report.problem or report.cleared or report.spared):
            print_text(f"{report.node}: nothing was left")


def _cleared(run: ClearedView) -> str:
    done = [f"ended {run.ended_processes} processes"] if run.ended_processes else []
    removed = [what for what, is_so in _removed(run) if is_so]
    done += [f"removed {' and '.join(removed)}"] if removed else []
    return ", ".join(done) or "nothing could be done"


def _removed(run: ClearedView) -> list[tuple[str, bool]]:
    return [("its lock", run.removed_lock), ("its files", run.removed_files)]


def show_step(step: StepView) -> None:
    """A line on stderr when something begins."""
    note(f"{step.node}: {step.text}")


def show_prepared(result: PreparedView) -> None:
    """A line on stderr when a machine is ready, or is not."""
    note(f"{result.node}: {result.status}: {result.detail}")
    if result.hint:
        note(f"  hint: {result.hint}")


def show_answer(answer: AnswerView) -> None:
    """A machine has answered, or not: one line on stderr, and what is missing there."""
    if answer.facts is not None:
        facts = answer.facts
        size = f"{format_gib(facts.memory_bytes)} of memory"
        note(f"{answer.name}: {facts.chip}, {size}, MLX may use {format_gib(facts.limit_bytes)}")
    if answer.problem and answer.facts is not None:
        warn(f"{answer.problem}; {answer.hint}" if answer.hint else answer.problem)


def print_cluster(
    cluster: ClusterView,
    activities: Mapping[str, ActivityView] | None = None,
    problems: Mapping[str, str] | None = None,
) -> None:
    """Draw a cluster: a block per machine, and what joins it to the next ones.

    Args:
        cluster: the cluster.
        activities: per node what runs there; None for a node that did not say.
        problems: per node why it did not.
    """
    known = [node for node in cluster.nodes if node.memory_bytes]
    total = sum(node.limit_bytes for node in known)
    count = f"{len(cluster.nodes)} node{'s' if len(cluster.nodes) != 1 else ''}"
    print_text(f"{cluster.name}: {count}, MLX may use {format_gib(total)} in all")
    for index, node in enumerate(cluster.nodes):
        print_text()
        print_text(f"● {_title(node)}")
        for line in _details(node, activities, problems):
            print_text(f"│ {line}")
        for link in cluster.links:
            if link.first == node.name:
                print_text(f"├─ {_link(link)}")
        if index == len(cluster.nodes) - 1 and len(cluster.nodes) > 1 and not cluster.links:
            print_text()
            print_text("no network is known that joins these machines")


def _title(node: NodeView) -> str:
    return node.name if node.hostname in ("", node.name) else f"{node.name} ({node.hostname})"


def _details(
    node: NodeView,
    activities: Mapping[str, ActivityView] | None,
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
    if activities is None:
        return lines if node.python else [*lines, "this k2 is not installed there"]
    activity = activities.get(node.name)
    if activity is None:
        return [*lines, (problems or {}).get(node.name, "did not answer")]
    lines += [_lock(lock) for lock in activity.locks]
    lines += [_run(run) for run in activity.runs]
    return lines if activity.runs or activity.locks else [*lines, "nothing runs"]


def _lock(lock: LockView) -> str:
    claim = lock.claim
    state = "" if lock.state == "held" else f", {lock.state}: k2 cluster clean ends what is left"
    return f"taken by {claim.run_id} of {claim.user} from {claim.host}{state}"


def _run(run: RunView) -> str:
    return f"runs {run.run_id}: {run.processes} processes, {format_bytes(run.resident_bytes)}"


def _link(link: LinkView) -> str:
    kind = f"{link.kind}, RDMA" if link.rdma else link.kind
    here = " ".join(filter(None, [link.first_interface, link.first_address]))
    there = " ".join(filter(None, [link.second_interface, link.second_address]))
    return f"{kind}: {here} ── {there} → {link.second}"


def print_cluster_names(clusters: Sequence[ClusterView]) -> None:
    """One line per cluster."""
    if not clusters:
        note("no clusters; describe your machines with: k2 cluster init HOST HOST --name NAME")
    for cluster in clusters:
        limit = format_gib(sum(node.limit_bytes for node in cluster.nodes))
        print_text(f"{cluster.name}  {', '.join(node.name for node in cluster.nodes)}  {limit}")
