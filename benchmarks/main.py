"""The command line of the benchmarks: choose comparisons, measure, write the files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.checkpoints import LARGE_TOY, SMALL_TOY, copy_in_float32, make_toy
from benchmarks.comparison import Comparison, compare, say
from benchmarks.k2_sides import K2Engine, K2Server
from benchmarks.loading import loading_rows
from benchmarks.mlx_sides import MlxLibrary, MlxServer
from benchmarks.overlap import OVERLAP, TITLES, overlap_rows
from benchmarks.report import (
    Row,
    document,
    heading,
    into_document,
    merged,
    replace_rows,
    rows_of,
    table,
)
from benchmarks.sides import Setting, Strategy
from benchmarks.work import (
    BenchmarkModel,
    Work,
    decode,
    english_prompt,
    prefill,
    second_turn,
    toy_prompt,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the command line."""

    output: Path
    quick: bool
    rounds: int
    only: str
    starts: bool
    docs: Path | None
    models: Path
    niceness: int
    cores_per_node: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write ``benchmark.md`` and ``benchmark.json``."""
    options = _options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    processes.prefer(os.getpid(), options.niceness)
    try:
        _measure_all(options)
    finally:
        # The group is the whole session: the shell that this was started from, too.
        if options.niceness:
            processes.reset_preference(os.getpid())
    return 0


def _measure_all(options: Options) -> None:
    # Short-lived state lies elsewhere: run folders have sockets, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="k2-bench-") as folder:
        rows: list[Row] = _earlier_rows(options)
        for measure in _measurements(options, Path(folder)):
            rows = merged(rows, measure())
            _write(options, merged(rows, overlap_rows(rows)))


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark-peers",
        description="Measure k2 against mlx-lm, in turns on the same cores.",
    )
    parser.add_argument("--output", type=Path, default=Path(".k2/benchmarks"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="small toy only; under 3 minutes")
    parser.add_argument("--rounds", type=int, help="number of rounds")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only comparisons whose name has it; other rows in FOLDER stay",
    )
    parser.add_argument(
        "--starts", action="store_true", help="only the rows of starts; other rows in FOLDER stay"
    )
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table into this file")
    parser.add_argument("--models", type=Path, help="folder that keeps checkpoints")
    parser.add_argument(
        "--niceness",
        type=int,
        default=0,
        help="niceness of both programs on a shared machine, such as -10; needs root",
    )
    parser.add_argument(
        "--cores-per-node",
        type=int,
        default=1,
        metavar="N",
        help="cores that rank 0 and its HTTP server share, and those of each other rank",
    )
    given = parser.parse_args(arguments)
    rounds = given.rounds or (2 if given.quick else 5)
    models = given.models or given.output / "models"
    return Options(
        given.output,
        given.quick,
        rounds,
        given.only,
        given.starts,
        given.docs,
        models.resolve(),
        given.niceness,
        given.cores_per_node,
    )


def _earlier_rows(options: Options) -> list[Row]:
    """Read the rows of an earlier run into the same folder, for ``--only`` and ``--starts``."""
    path = options.output / "benchmark.json"
    if not (options.only or options.starts) or not path.is_file():
        return []
    return [row for row in rows_of(json.loads(path.read_text())) if row.placement != OVERLAP]


def _measurements(options: Options, folder: Path) -> list[Callable[[], list[Row]]]:
    names = ["small library", "small pipeline", "small tensor"]
    if not options.quick:
        names += [f"large {kind}" for kind in TITLES]
        names += ["demo library", "demo single", "demo pipeline"]
        names += ["load single", "load pipeline", "load tensor"]
    if options.starts:
        names = [name for name in names if not name.startswith("load") and "library" not in name]
    chosen = [name for name in names if options.only in name]
    return [partial(_measure, options, folder, *name.split()) for name in chosen]


def _measure(options: Options, folder: Path, model_name: str, kind: str) -> list[Row]:
    scratch = folder / f"{model_name}-{kind}"
    scratch.mkdir()
    strategy: Strategy = "single" if kind == "library" else kind  # type: ignore[assignment]
    checkpoint, model = _model(options, "large" if model_name == "load" else model_name)
    setting = Setting(
        checkpoint,
        strategy,
        scratch,
        niceness=options.niceness,
        cores_per_node=options.cores_per_node,
    )
    if model_name == "load":
        return loading_rows(model.title, TITLES[kind], setting)
    return compare(_comparison(options, setting, model, model_name, kind))


def _comparison(
    options: Options, setting: Setting, model: BenchmarkModel, model_name: str, kind: str
) -> Comparison:
    make: Any = (partial(K2Server, setting), partial(MlxServer, setting))
    placement = TITLES[kind]
    if kind == "library":
        make = (partial(K2Engine, setting), partial(MlxLibrary, setting))
    if model_name == "demo" and kind == "pipeline":
        # mlx-lm has no pipeline for this architecture, and three KV heads cannot be halved.
        make = (make[0], partial(MlxServer, replace(setting, strategy="single")))
        placement = "two, pipeline, against one of mlx-lm"
    return Comparison(
        placement,
        model,
        make,
        [] if options.starts else _works(model_name, kind, quick=options.quick),
        options.rounds,
        starts=0 if kind == "library" else min(3, options.rounds),
    )


def _works(model_name: str, kind: str, *, quick: bool) -> list[Work]:
    batch = 1.5 if kind == "pipeline" else 1.05
    works = [decode(1, 1.0), decode(4, batch)]
    if not quick:
        works.append(decode(8, batch))
    if model_name != "demo":
        works.append(prefill(1.0))
    if kind != "library":
        works.append(second_turn(1.0))
    return works


def _model(options: Options, name: str) -> tuple[Path, BenchmarkModel]:
    """Return the checkpoint, made if it does not exist, and what is known of it."""
    options.models.mkdir(parents=True, exist_ok=True)
    match name:
        case "small":
            folder = make_toy(options.models / "toy-k2-small", SMALL_TOY)
            prefill_tokens = 512 if options.quick else 2048
            return folder, BenchmarkModel(
                "toy K2, small", toy_prompt, 48, prefill_tokens, prefill_tokens // 2
            )
        case "large":
            folder = make_toy(options.models / "toy-k2-large", LARGE_TOY)
            # A minute each: two of them, one for each order of the programs.
            return folder, BenchmarkModel(
                "toy K2, large", toy_prompt, 32, 2048, 128, long_rounds=2, first_tokens=256
            )
        case _:
            return _demo(options), BenchmarkModel("demo", english_prompt, 12, 96, 48)


def _demo(options: Options) -> Path:
    from k2cli.models.sources.download import fetch

    target = options.models / "demo"
    if not (target / "config.json").is_file():
        downloaded = options.models / "demo.downloaded"
        shutil.rmtree(downloaded, ignore_errors=True)
        fetch("demo", destination=downloaded, on_event=lambda _: None)
        copy_in_float32(downloaded, target)
        shutil.rmtree(downloaded)
    return target


def _write(options: Options, rows: Sequence[Row]) -> None:
    settings: dict[str, Any] = {
        "rounds": options.rounds,
        "quick": options.quick,
        "only": options.only,
    }
    settings["niceness"] = options.niceness
    settings["cores_per_node"] = options.cores_per_node
    text = f"{heading(settings)}\n\n{table(rows)}"
    _replace(options.output / "benchmark.md", f"{text}\n")
    _replace(options.output / "benchmark.json", json.dumps(document(rows, settings), indent=1))
    if options.docs is not None:
        page = options.docs.read_text()
        page = replace_rows(page, rows) if options.starts else into_document(page, text)
        _replace(options.docs, page)
    say(f"wrote {options.output / 'benchmark.md'}")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def run() -> int:
    """Run ``main``; print errors as one line."""
    from k2cli.errors import K2Error

    try:
        return main()
    except K2Error as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
