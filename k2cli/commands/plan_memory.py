"""Command ``k2 plan-memory``: predict memory use and speed of a model on given machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from k2cli.planning.hardware.machine import NodeMemory
    from k2cli.planning.plan import Plan
    from k2cli.planning.planner import Planner
    from k2cli.planning.request import PlanRequest


def plan_memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Alias, Hub repository, folder or .gguf file; a config.json is enough.",
        ),
    ],
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Machines: '2x m3-ultra-512', 'm3-ultra-512 + m4-max-128', 'this' (default); "
            "NVIDIA's GPUs: '2x h200-141', '2x RTX 5090'."
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Machines of a cluster, as recorded by k2 cluster.")
    ] = None,
    parallel: options.Parallel = "auto",
    transport: options.Transport = "auto",
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompt tokens per step. Default: the largest useful number that fits."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Plan the model as quantized with this recipe: 4bit, mxfp4, mixed_3_6."),
    ] = None,
    dtype: options.FloatType = "auto",
    head: options.Head = "auto",
    collective_latency: Annotated[
        str | None,
        typer.Option(help="Measured time of one small message between ranks, such as 26us."),
    ] = None,
    prompt_tokens: options.PromptTokens = None,
    answer_tokens: options.AnswerTokens = None,
    kv_bits: options.KvBits = None,
    shop: Annotated[
        bool, typer.Option("--shop", help="List machines that can run the model, cheapest first.")
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw memory and speed against context length.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option(help="Save a drawing of the plan to an SVG file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, whether it fits or not.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Save the plan to a file, for k2 launch --plan.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the origin of each number.")
    ] = False,
) -> None:
    """Plan a model's memory and speed on one or more machines, before loading or buying anything.

    Exits with 0 if the model fits and 3 if it does not.

    Example: k2 plan-memory k2-thinking --hardware '2x m3-ultra-512' --context 131072
    """
    from k2cli.planning.planner import Planner
    from k2cli.planning.request import PlanRequest
    from k2cli.planning.speed.calibrations import with_calibration
    from k2cli.planning.speed.exchange import ANSWER_TOKENS, PROMPT_TOKENS
    from k2cli.ui.output import warn
    from k2cli.units import parse_latency

    request = PlanRequest(
        strategy=parallel,
        context_length=context,
        concurrency=concurrency or 1,
        dtype=dtype,
        head=head,
        chunk_tokens=chunk,
        transport=transport,
        collective_seconds=None
        if collective_latency is None
        else parse_latency(collective_latency),
        free_order=cluster is None,
        prompt_tokens=prompt_tokens or PROMPT_TOKENS,
        answer_tokens=answer_tokens or ANSWER_TOKENS,
        kv_bits=kv_bits or 0,
    )
    if shop:
        _refuse_beside_shop(hardware, cluster, plot, svg, save)
        _shop(Planner(model, quantize), request, as_json=as_json)
        return
    planner = Planner(model, quantize)
    machines = planner.with_gpus(_machines(hardware, cluster), request)
    nodes = with_calibration(machines, transport)
    for text in planner.model.warnings:
        warn(text)
    plan = planner.plan(nodes, request)
    planned = plan.request
    if short := request.shortening(
        planned.prompt_tokens, planned.answer_tokens, planned.context_length
    ):
        warn(short)
    if not plan.fits:
        from k2cli.planning.advice import advise

        plan = replace(plan, advice=advise(planner, nodes, request, plan))
    given = {
        "--hardware": hardware, "--cluster": cluster, "--parallel": parallel,
        "--backend": transport, "--context": context, "--concurrency": concurrency,
        "--quantize": quantize, "--chunk": chunk, "--dtype": dtype, "--head": head,
        "--collective-latency": collective_latency, "--prompt-tokens": prompt_tokens,
        "--answer-tokens": answer_tokens, "--kv-bits": kv_bits,
    }  # fmt: skip
    _write(planner, nodes, request, plan, save=save, svg=svg)
    _show(planner, nodes, request, plan, given, as_json=as_json, explain=explain, plot=plot)
    launchable = plan.fits and _is_launchable(planner, model)
    _finish(plan, save, quantize, given, launchable=launchable)


def _machines(hardware: str | None, cluster: str | None) -> list[NodeMemory]:
    from k2cli.errors import UsageError
    from k2cli.planning.hardware.spec import parse_hardware

    if cluster is None:
        return parse_hardware(hardware if hardware is not None else "this")
    if hardware is not None:
        raise UsageError("--hardware and --cluster both name machines", "leave out --hardware")
    from k2cli.cluster.description import load_cluster, node_memory

    return node_memory(load_cluster(cluster))


def _refuse_beside_shop(
    hardware: str | None, cluster: str | None, plot: bool, svg: Path | None, save: Path | None
) -> None:
    from k2cli.errors import UsageError

    beside = {
        "--hardware": hardware is not None,
        "--cluster": cluster is not None,
        "--plot": plot,
        "--svg": svg is not None,
        "--save": save is not None,
    }
    for option, given in beside.items():
        if given:
            raise UsageError(f"{option} cannot be used with --shop", f"leave out {option}")


def _shop(planner: Planner, request: PlanRequest, *, as_json: bool) -> None:
    from k2cli.errors import DoesNotFitError
    from k2cli.planning.shop import recipe_for_the_catalog, shop
    from k2cli.ui.output import print_json
    from k2cli.ui.plan.shop import print_shop

    result = shop(planner, request)
    if as_json:
        print_json(result)
    else:
        print_shop(result)
    if not result.offers:
        recipe = recipe_for_the_catalog(planner, request)
        raise DoesNotFitError(
            f"{planner.model.reference} does not fit on any machines of the catalog",
            f"--context {max(1, (request.context_length or 4096) // 2)}"
            if recipe is None
            else f"add --quantize {recipe}",
        )


def _write(
    planner: Planner,
    nodes: list[NodeMemory],
    request: PlanRequest,
    plan: Plan,
    *,
    save: Path | None,
    svg: Path | None,
) -> None:
    from k2cli.planning.plan import save_plan

    if save is not None:
        save_plan(plan, save)
    if svg is not None:
        from k2cli.planning.curve import context_curve
        from k2cli.ui.plan.svg import save_svg

        save_svg(plan, context_curve(planner, nodes, request, plan), svg)


def _show(
    planner: Planner,
    nodes: list[NodeMemory],
    request: PlanRequest,
    plan: Plan,
    given: dict[str, str | int | None],
    *,
    as_json: bool,
    explain: bool,
    plot: bool,
) -> None:
    from k2cli.planning.plan import plan_to_json
    from k2cli.ui.output import print_json
    from k2cli.ui.plan.table import can_print_unicode, print_plan

    if as_json:
        print_json(plan_to_json(plan))
        return
    unset = (None, "auto", 1)
    command = {option: str(value) for option, value in given.items() if value not in unset}
    print_plan(plan, command=command, explain=explain)
    if plot:
        from k2cli.planning.curve import context_curve
        from k2cli.ui.plan.plot import print_plot

        curve = context_curve(planner, nodes, request, plan)
        print_plot(curve, plan.request.context_length, unicode=can_print_unicode())


def _is_launchable(planner: Planner, model: str) -> bool:
    """Return False for a folder without weights that k2 reads, which a launch refuses.

    It also refuses one without a tokenizer, or with text files that are not what they seem; then
    the reason is a warning.
    """
    from k2cli.errors import K2Error
    from k2cli.models.reference import parse_reference
    from k2cli.models.text.present import check_text_files
    from k2cli.ui.output import warn

    reference = parse_reference(model)
    if reference.kind != "local":
        return True
    if planner.model.stored is None:
        return False
    if reference.path is not None and reference.path.is_dir():
        try:
            check_text_files(reference.path)
        except K2Error as error:
            warn(f"a launch refuses this folder: {error.message}")
            return False
    return True


def _finish(
    plan: Plan,
    save: Path | None,
    quantize: str | None,
    given: Mapping[str, str | int | None],
    *,
    launchable: bool,
) -> None:
    from k2cli.errors import DoesNotFitError
    from k2cli.planning.model import quantize_command
    from k2cli.ui.plan.table import print_plan_hints, shortfalls

    if not plan.fits:
        raise DoesNotFitError(f"{plan.model.reference} does not fit: {shortfalls(plan)}")
    first = ""
    if quantize is not None:
        first = quantize_command(plan.model.reference, quantize)
    if launchable:
        command = {name: str(value) for name, value in given.items() if value not in (None, "auto")}
        print_plan_hints(plan, saved_as=save, command=command, first=first)
