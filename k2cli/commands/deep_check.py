"""The link check of ``k2 doctor --deep``: a run whose ranks compare longer and longer prompts.

It takes the way of ``k2 launch``: the same plan, transport, addresses, guards and ranks. All
lengths are checked in one run, since over JACCL only a few launches work until a restart.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k2cli.choices import CheckedTransport, Parallel

if TYPE_CHECKING:
    from k2cli.doctor.results import CheckResult
    from k2cli.launch.request import LaunchRequest
    from k2cli.nodes.node import Node

_NAME = "link data"
_MOST_TOKENS = 8192
_FIRST_TOKENS = 1024
_LENGTH_SECONDS = 300.0
"""About the longest time for one length; a slow machine checks the part that it can."""


@dataclass(frozen=True, slots=True)
class DeepOptions:
    """Options of ``k2 doctor --deep``, as given."""

    cluster: str | None
    nodes: str | None
    transport: CheckedTransport
    parallel: Parallel | None
    model: str | None
    most_tokens: int | None


def deep_check(options: DeepOptions, *, possible: bool) -> CheckResult:
    """Start ranks on the nodes of a cluster, and check what they send to each other.

    Args:
        options: the options of the command.
        possible: False if another check has failed, so that ranks would fail as well.

    Raises:
        UsageError: if there are not several ranks, or the options are wrong.
    """
    from k2cli.doctor.results import CheckResult
    from k2cli.errors import ClusterError, DoesNotFitError
    from k2cli.nodes.locks import BusyError
    from k2cli.supervisor.signals import interrupted_by_signals

    names = rank_names(options)
    if not possible:
        return CheckResult("skip", _NAME, None, "not checked: first fix what has failed above")
    lengths = lengths_up_to(options.most_tokens or _MOST_TOKENS)
    stopping = interrupted_by_signals(signal.SIGTERM, signal.SIGHUP)
    with stopping, _model(options.model, names) as model:
        request = _request(options, names, model, lengths)
        try:
            backend, checked = _run(request)
        except BusyError as error:
            clean = error.hint if error.hint and error.hint.startswith("k2 ") else None
            command = clean or f"k2 stop {error.holder}"  # the doctor has no --wait and no --share
            return CheckResult("fail", _NAME, None, f"not compared: {error.message}", command)
        except (ClusterError, DoesNotFitError) as error:
            return CheckResult("fail", _NAME, None, error.message, error.hint or _hint(options))
    detail = f"{backend}: prompts of up to {checked:,} tokens, computed twice, came out equal"
    if checked < lengths[-1]:
        detail += f"; longer ones than that would take more than {_LENGTH_SECONDS:.0f} s"
    return CheckResult("pass", _NAME, None, detail)


def lengths_up_to(most: int) -> tuple[int, ...]:
    """Return the lengths of the prompts: powers of two, and the longest."""
    lengths = []
    tokens = _FIRST_TOKENS
    while tokens < most:
        lengths.append(tokens)
        tokens *= 2
    return (*lengths, most)


def rank_names(options: DeepOptions) -> tuple[str, ...]:
    """Return a node per rank; a name of ``--nodes`` may repeat, as for launch.

    Raises:
        UsageError: if there are not several ranks.
    """
    from k2cli.cluster.description import load_cluster
    from k2cli.errors import UsageError
    from k2cli.nodes.node import LOCALHOST

    if options.nodes is not None:
        names = tuple(name.strip() for name in options.nodes.split(","))
    else:
        with contextlib.suppress(UsageError):
            cluster = load_cluster(options.cluster)
            names = tuple(node.name for node in cluster.rank_nodes)
            if len(names) > 1:
                return names
        names = (LOCALHOST,)
    if len(names) < 2:
        raise UsageError(
            "--deep compares what several ranks send, and there is one node",
            "k2 doctor --deep --nodes localhost,studio2",
        )
    return names


@contextlib.contextmanager
def _model(named: str | None, names: Sequence[str]) -> Iterator[str]:
    """Yield the reference of the model: the named one, or one that is made on each node."""
    from k2cli.cluster.node_lookup import node_named
    from k2cli.models.link_check_model import FOLDER_NAME
    from k2cli.settings import cache_directory

    if named is not None:
        yield named
        return
    nodes = [node_named(name) for name in dict.fromkeys(names)]
    # Each machine has its own home folder, and its own name for it.
    here = all(node.is_local for node in nodes)
    folder = str(cache_directory() / FOLDER_NAME) if here else f"~/.cache/k2/{FOLDER_NAME}"
    made: list[tuple[Node, str]] = []
    try:
        for node in nodes:
            made.append((node, node.ask(str, "make-link-model", folder)))
        if not any(node.is_local for node in nodes):
            from k2cli.nodes.local import LocalNode

            own = LocalNode()
            made.append((own, own.ask(str, "make-link-model", folder)))
        yield folder
    finally:
        for node, path in made:
            _remove(node, path)


def _remove(node: Node, path: str) -> None:
    """Remove the model that was made on a node; one that is gone must not hide what was found."""
    from k2cli.errors import K2Error
    from k2cli.ui.output import warn

    try:
        node.ask(object, "remove-folder", path)
    except K2Error as error:
        warn(f"on {node.name}: {path} is left: {error.message}")


def _request(
    options: DeepOptions, names: tuple[str, ...], model: str, lengths: tuple[int, ...]
) -> LaunchRequest:
    from k2cli.launch.request import LaunchRequest

    return LaunchRequest(
        model=model,
        nodes=names if options.nodes is not None else None,
        cluster=_cluster(options),
        transport=options.transport,
        parallel=options.parallel or ("tensor" if options.model is None else "auto"),
        context_length=lengths[-1] + 1,
        concurrency=1,
        ends_with_check=True,
        link_check="always",
        link_check_tokens=lengths,
        link_check_seconds=_LENGTH_SECONDS,
    )


def _cluster(options: DeepOptions) -> str | None:
    from k2cli.cluster.description import load_cluster

    return load_cluster(options.cluster).name if options.nodes is None else None


def _run(request: LaunchRequest) -> tuple[str, int]:
    """Launch, wait until the run is ready, and stop it; return the backend and the tokens.

    The run ends with this process, also if it is killed, and is then listed only if it has failed.
    """
    from k2cli.commands.run_start import Following, prepare
    from k2cli.protocol import RunEvent, RunReady
    from k2cli.runs.lease import hold
    from k2cli.runs.record import list_runs
    from k2cli.runs.stop import stop_run
    from k2cli.supervisor.start import cleanup_on_error, launch_detached
    from k2cli.ui.output import note

    note("starting ranks that compare what they send")
    run = prepare(request)
    checked = 0

    with (
        contextlib.ExitStack() as held,
        cleanup_on_error(run.record, note),
        Following(run.record) as following,
    ):
        held.callback(list_runs)  # which removes this run, once its lease is released
        with contextlib.suppress(OSError):  # some network file systems have no locks
            lease = hold(run.record.folder)
            if lease is not None:
                held.callback(lease.close)

        def on_event(event: RunEvent) -> None:
            nonlocal checked
            if isinstance(event, RunReady):
                checked = event.checked_tokens
            else:
                following.show(event)

        record = launch_detached(run.record, on_event, following.interrupted)
        stop_run(record)
    return f"{record.strategy} over {record.backend}", checked


def _hint(options: DeepOptions) -> str:
    return "k2 logs" if options.transport == "ring" else "k2 doctor --deep --backend ring"
