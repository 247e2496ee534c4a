"""Preparing a run and showing its start, for all commands that start one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2cli.launch.request import LaunchRequest
    from k2cli.launch.specification import RunDecisions
    from k2cli.protocol import RunEvent
    from k2cli.runs.record import RunRecord


def prepare(request: LaunchRequest) -> RunDecisions:
    """Prepare the run; with ``--fetch``, show how the weights come to the nodes."""
    from k2cli.commands.models.push import push_progress
    from k2cli.launch.prepare import prepare_run
    from k2cli.ui.output import note

    if not request.fetch:
        return prepare_run(request, note)
    with push_progress("give the same command again") as show:
        return prepare_run(request, note, show)


class Following:
    """View of the start of a run, as a context manager.

    It shows the last lines of a run that fails.

    Args:
        record: the run.
        log: True if lines of the ranks are shown, too.
    """

    def __init__(self, record: RunRecord, *, log: bool = False) -> None:
        from k2cli.ui.launch_view import LaunchView

        self._record = record
        self._view = LaunchView([rank.place for rank in record.ranks], log=log)

    def __enter__(self) -> Following:
        self._view.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        from k2cli.errors import ClusterError
        from k2cli.runs.record import read_record
        from k2cli.ui.launch_view import print_last_lines

        self._view.__exit__(kind, *exception)
        if kind is not None and issubclass(kind, ClusterError):
            record = read_record(self._record.folder)
            if record is not None and record.failure is not None:
                print_last_lines(record.failure.last_lines)

    def show(self, event: RunEvent) -> None:
        """Show an event of the run."""
        from k2cli.protocol import (
            LoadProgress,
            LogLine,
            RankFailed,
            RankReady,
            RunReady,
            RunRestarting,
        )

        match event:
            case LoadProgress(phase="warming up"):
                self._view.warming_up(event.rank, event.shape, event.number, event.count)
            case LoadProgress():
                self._view.progress(event.rank, event.phase, event.done_bytes, event.total_bytes)
            case RankReady():
                self._view.rank_ready(
                    event.rank, event.weights_bytes, event.load_seconds, event.bytes_read
                )
            case RunReady():
                record = self._record
                self._view.ready(
                    record.run_id,
                    record.model_name,
                    event.url,
                    event.checked_tokens,
                    event.remark,
                )
            case RankFailed():
                self._view.failed(event.rank, event.cause)
            case RunRestarting():
                self._view.restarting(event.cause, event.attempt, event.delay_seconds)
            case LogLine():
                self._view.line(event.node, event.rank, event.text)

    def interrupted(self, first: bool) -> None:
        """Say that Ctrl-C stops the run."""
        from k2cli.ui.output import note

        self._view.end_progress()
        note("\nstopping; Ctrl-C again to force" if first else "\nforcing the stop")


def show_plan(run: RunDecisions) -> None:
    """Show the plan and the settings of a prepared run, and what is to be minded."""
    from k2cli.launch.endpoint import endpoint_warnings
    from k2cli.launch.transport import restart_warnings
    from k2cli.ui.output import note, warn
    from k2cli.ui.plan.table import plan_lines
    from k2cli.units import one_line

    for line in plan_lines(run.plan):
        note(line)
    if not run.plan.fits:
        warn("the plan does not fit; launching because of --force")
    note(f"\nrun {run.record.run_id}:")
    for name, value in run.record.settings.items():
        note(one_line(f"  {name}: {value}"))
    if run.generated_api_key:
        note(f"the API key is in {run.record.api_key_file}")
    restarts = restart_warnings(run.transport, run.request.restart)
    for warning in [*restarts, *endpoint_warnings(run)]:
        warn(warning)
