"""``k2 plan-memory``: will the model fit, and where does the memory go?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan_memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Alias, Hub repository or folder; a config.json is enough."
        ),
    ],
    hardware: Annotated[
        str,
        typer.Option(help="Machines: '2x m3-ultra-512', 'm3-ultra-512 + m4-max-128', 'this'."),
    ] = "this",
    parallel: Annotated[
        str, typer.Option(help="How to divide the model: auto, single, pipeline or tensor.")
    ] = "auto",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per sequence. Default: the model's maximum, at most 32768."),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Sequences held at a time.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Activations: auto, float32, bfloat16 or float16.")
    ] = "auto",
    head: Annotated[
        str, typer.Option(help="Output head of tensor slices: auto, replicated or sharded.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, whether it fits or not.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan to a file, for k2 launch --plan.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where each number is from.")
    ] = False,
) -> None:
    """Plan a model's memory on one or more machines, before loading or buying anything.

    Exits with 0 if it fits and 3 if it does not.

    Example: k2 plan-memory k2-thinking --hardware '2x m3-ultra-512' --context 131072
    """
    from k2cli.errors import DoesNotFitError
    from k2cli.planning.hardware_spec import parse_hardware
    from k2cli.planning.plan import plan_to_json, save_plan
    from k2cli.planning.planner import make_plan
    from k2cli.ui.output import print_json
    from k2cli.ui.plan_table import print_plan, print_plan_hints, shortfalls

    plan = make_plan(
        model,
        parse_hardware(hardware),
        strategy=parallel,
        context_length=context,
        concurrency=concurrency,
        dtype=dtype,
        head=head,
    )
    if save is not None:
        save_plan(plan, save)
    if as_json:
        print_json(plan_to_json(plan))
    else:
        print_plan(plan, explain=explain)
    if not plan.fits:
        raise DoesNotFitError(
            f"{model} does not fit: {shortfalls(plan)}",
            "a shorter --context, fewer bits, or more machines in --hardware",
        )
    print_plan_hints(plan, saved_as=save)
