"""Command ``k2 bench``: measure the speed of a served model."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.target import ApiKeyOption, ModelArgument, Target, UrlOption, resolve_target

if TYPE_CHECKING:
    from k2cli.bench.calibrate import Calibrated
    from k2cli.bench.calibration_rounds import Rounds
    from k2cli.bench.cases import BenchCase
    from k2cli.bench.report import BenchReport, BenchRow, RunDescription
    from k2cli.client.client import ApiClient, ModelInfo
    from k2cli.planning.plan import Plan
    from k2cli.runs.record import RunRecord
    from k2cli.ui.bench_table import BenchLine


class BenchFormat(StrEnum):
    """Output format."""

    md = "md"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    sql = "sql"


def bench(
    model: ModelArgument = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Numbers of prompt tokens to process; 0 for none.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", help="Numbers of tokens to generate; 0 for none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens of context before the measured ones.")
    ] = "0",
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Numbers of concurrent requests.")
    ] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Measurements of each case.")
    ] = 5,
    output: Annotated[
        BenchFormat, typer.Option("--output", "-o", help="Output format.")
    ] = BenchFormat.md,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure a live run for a minute or two, so that plan-memory predicts its "
            "machines better.",
        ),
    ] = False,
) -> None:
    """Measure the speed of prompt processing (pp) and generation (tg) of a served model.

    Sizes may be lists, such as 512,2048 or 2k,16k. Every combination is measured after a warm-up.
    The table shows mean and standard deviation; the other formats contain every sample. The prefix
    cache is not used. Single requests are timed by the server's clock, concurrent ones by the
    client's.

    Example: k2 bench -p 512,2048 -n 128 -d 0,4096 -r 3 -o json
    """
    from k2cli.bench.cases import check_context, make_cases, parse_sizes
    from k2cli.client.client import ApiClient
    from k2cli.ui.output import note

    if calibrate:
        _calibrate(model, url, api_key, repetitions, output)
        return
    cases = make_cases(
        parse_sizes(prompt, "--prompt"),
        parse_sizes(generate, "--generate"),
        parse_sizes(depth, "--depth"),
        parse_sizes(concurrency, "--concurrency", at_least=1),
    )
    target = resolve_target(model, url, api_key)
    with ApiClient(target.url, target.api_key, target.certificate) as client:
        info = client.pick_model(target.model)
        check_context(cases, info.context_length)
        names = ", ".join(case.name for case in cases)
        note(f"measuring {names}: a warm-up and {repetitions} run(s) of each")
        _measure_and_print(client, info, target, cases, repetitions, output)


def _measure_and_print(
    client: ApiClient,
    model: ModelInfo,
    target: Target,
    cases: list[BenchCase],
    repetitions: int,
    output: BenchFormat,
) -> None:
    """Measure all cases, and print the finished rows even if a later one fails."""
    from datetime import UTC, datetime

    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[BenchRow] = []
    try:
        _measure(client, model, cases, repetitions, rows)
    finally:
        if rows:
            _print(_report(client, model, target, rows, started), output)


def _measure(
    client: ApiClient,
    model: ModelInfo,
    cases: list[BenchCase],
    repetitions: int,
    rows: list[BenchRow],
) -> None:
    """Append a row for each case, and print progress."""
    from k2cli.bench.measure import RowDone, measure
    from k2cli.client.client import CompletionSource
    from k2cli.ui.output import note

    for event in measure(CompletionSource(client, model), cases, repetitions):
        if isinstance(event, RowDone):
            rows.append(event.row)
        else:
            which = f"run {event.index} of {event.of}" if event.index else "warm-up"
            note(f"{event.case.name}: {which}: {event.sample.tokens_per_second:.2f} t/s")


def _report(
    client: ApiClient, model: ModelInfo, target: Target, rows: list[BenchRow], started: str
) -> BenchReport:
    from k2cli.bench.report import BenchReport, describe_environment

    run = _described(target.run) if target.run is not None else None
    return BenchReport(model.name, client.base, tuple(rows), run, describe_environment(), started)


def _calibrate(
    model: str | None, url: str | None, api_key: str | None, repetitions: int, output: BenchFormat
) -> None:
    """Measure a run of this machine, compute the rates of its nodes, and save them."""
    from datetime import UTC, datetime

    from k2cli.bench.calibrate import calibrate_run, calibrated_members
    from k2cli.bench.calibration_rounds import PROBE, Rounds, calibration_schedule
    from k2cli.client.client import ApiClient
    from k2cli.cluster.node_lookup import node_named
    from k2cli.planning.hardware.machine import planned_gpu
    from k2cli.ui.bench_table import calibration_lines
    from k2cli.ui.output import note

    target, run = _own_run(model, url, api_key)
    plan = _plan_of(run)
    nodes = {name: node_named(name).memory() for name in run.nodes}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with ApiClient(target.url, target.api_key, target.certificate) as client:
        info = client.pick_model(target.model)
        probe: list[BenchRow] = []
        _measure(client, info, [PROBE], 1, probe)
        rounds = Rounds(
            calibration_schedule(
                probe[0], info.context_length, plan.request.concurrency, repetitions
            )
        )
        interrupted = _measure_rounds(client, info, rounds)
        by_rank = [planned_gpu(nodes[rank.node], rank.gpu) for rank in run.ranks]
        rows = list(rounds.rows())
        calibrated = calibrate_run(plan, by_rank, run.backend, rows)
        _print(_report(client, info, target, rows, started), output, calibrated)
    for line in calibration_lines(calibrated_members(calibrated)):
        note(line)
    if interrupted:
        raise KeyboardInterrupt


def _own_run(model: str | None, url: str | None, api_key: str | None) -> tuple[Target, RunRecord]:
    from k2cli.errors import UsageError

    target = resolve_target(model, url, api_key)
    if target.run is None:
        raise UsageError(
            f"--calibrate needs a run of this machine, because it reads the run's plan, not {url}",
            "k2 bench --calibrate",
        )
    return target, target.run


def _measure_rounds(client: ApiClient, model: ModelInfo, rounds: Rounds) -> bool:
    """Measure all rounds and print progress; return True if Ctrl-C ended them early.

    Raises:
        KeyboardInterrupt: if too few rounds were measured to be saved.
    """
    from k2cli.bench.calibration_rounds import LEAST_ROUNDS
    from k2cli.bench.measure import RepetitionDone, measure
    from k2cli.client.client import CompletionSource
    from k2cli.ui.output import note
    from k2cli.units import format_duration

    plan = rounds.schedule
    plural = "" if plan.rounds == 1 else "s"
    note(
        f"calibrating with {', '.join(case.name for case in plan.cases)}: "
        f"{plan.rounds} round{plural} in "
        f"about {format_duration(plan.expected_seconds)}, at most "
        f"{format_duration(plan.most_seconds)}"
    )
    source = CompletionSource(client, model)
    try:
        for event in measure(source, plan.cases, plan.rounds, in_turns=True, warm_up=False,
                             enough=rounds.enough):  # fmt: skip
            if isinstance(event, RepetitionDone):
                rounds.add(event)
                note(
                    f"round {event.index} of {event.of}: {event.case.name}: "
                    f"{event.sample.tokens_per_second:.2f} t/s, "
                    f"{format_duration(rounds.seconds_left)} left"
                )
    except KeyboardInterrupt:
        if rounds.complete < LEAST_ROUNDS:
            note(f"stopped after {rounds.complete} rounds, too few to save: nothing is changed")
            raise
        note(f"stopped after {rounds.complete} rounds, which are saved")
        return True
    return False


def _plan_of(run: RunRecord) -> Plan:
    from k2cli.errors import K2Error
    from k2cli.files import read_regular
    from k2cli.planning.plan import LIMIT_BYTES, plan_from_json

    path = run.folder / "plan.json"
    try:
        return plan_from_json(read_regular(path, LIMIT_BYTES), str(path))
    except OSError as error:
        raise K2Error(f"the plan of run {run.run_id} cannot be read: {error.strerror}") from error


def _described(run: RunRecord) -> RunDescription:
    from k2cli.bench.report import RunDescription

    return RunDescription(
        run_id=run.run_id,
        transport=run.backend,
        strategy=run.strategy,
        context_length=run.context_length,
        nodes=tuple(rank.node for rank in run.ranks),
    )


def _print(report: BenchReport, output: BenchFormat, calibrated: Calibrated | None = None) -> None:
    from k2cli.bench.calibrate import calibrated_members
    from k2cli.bench.formats import to_csv, to_json_lines, to_sql
    from k2cli.bench.report import report_document
    from k2cli.ui.bench_table import bench_markdown
    from k2cli.ui.output import print_json, print_text

    match output:
        case BenchFormat.json:
            more = {} if calibrated is None else {"calibration": calibrated_members(calibrated)}
            print_json(report_document(report) | more)
        case BenchFormat.jsonl:
            print_text(to_json_lines(report))
        case BenchFormat.csv:
            print_text(to_csv(report))
        case BenchFormat.sql:
            print_text(to_sql(report))
        case BenchFormat.md:
            print_text(bench_markdown(_lines(report)))


def _lines(report: BenchReport) -> list[BenchLine]:
    from k2cli.bench.report import mean_and_deviation
    from k2cli.ui.bench_table import BenchLine

    return [
        BenchLine(
            model=report.model,
            placement=report.placement,
            test=row.case.name,
            tokens_per_second=mean_and_deviation(row.rates),
            first_token_seconds=mean_and_deviation(row.first_token),
        )
        for row in report.rows
    ]
