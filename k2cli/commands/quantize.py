"""Command ``k2 quantize``: convert a checkpoint into a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from k2cli.quantization.events import QuantizationResult


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or model reference of the original.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Folder for the new checkpoint.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="All settings in one word, as for plan-memory --quantize: 4bit, 3bit-g32, mxfp4, "
            "mixed_3_6."
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8. Default: 4.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale: 32, 64 or 128. Default: 64.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Number format: affine (default), mxfp4, mxfp8 or nvfp4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resulting size, and write nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize a checkpoint, tensor by tensor, into a new folder.

    The result is byte for byte that of mlx_lm.convert, but needs little memory. Router, norms and
    other small tensors are not quantized. The new folder appears only when it is complete.

    Example: k2 quantize ./Kimi-K2-Instruct --to ./Kimi-K2-4bit --recipe 4bit
    """
    from k2cli.errors import UsageError
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.models.reference import local_checkpoint
    from k2cli.quantization.convert import quantize as run
    from k2cli.quantization.events import BytesDone, QuantizationResult
    from k2cli.sharding.recipe import chosen_recipe
    from k2cli.ui.output import print_json, warn
    from k2cli.ui.progress import ByteProgress

    wanted = chosen_recipe(recipe, bits, group_size, mode)
    suggestion = Path(f"{Path(source).name}-{wanted}")
    if to is None and not dry_run:
        raise UsageError("--to FOLDER is missing", f"k2 quantize {source} --to {suggestion}")
    folder = local_checkpoint(source)
    for text in read_checkpoint(folder).warnings:
        warn(text)
    with ByteProgress() as progress:
        if not dry_run:
            progress.step(f"quantizing {source} to {wanted}")
        for event in run(folder, to or suggestion, wanted, dry_run=dry_run):
            if isinstance(event, BytesDone):
                progress.advance(event.done_bytes, event.total_bytes)
            elif isinstance(event, QuantizationResult):
                result = event
    if json:
        print_json(result)
    else:
        _summarize(result)


def _summarize(result: QuantizationResult) -> None:
    from k2cli.ui.output import note, print_line
    from k2cli.units import format_bytes

    sizes = (
        f"{format_bytes(result.source_bytes)} -> {format_bytes(result.stored_bytes)}, "
        f"{result.bits_per_weight} bits per weight, {result.quantized_modules} modules quantized"
    )
    if result.dry_run:
        print_line(f"would write {result.path}: {sizes}")
        return
    print_line(f"{result.path}: {sizes}")
    note(f"peak memory of arrays: {format_bytes(result.peak_memory_bytes)}")
    note(f"\nnext: k2 plan-memory {result.path}")
    note(f"      k2 launch {result.path}")
