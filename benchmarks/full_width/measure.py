"""The figures of full-width layers on this machine, each stage a command that ends in ten minutes.

    python -m benchmarks.full_width.measure start k2:tensor:nccl --cold OPTIONS
    python -m benchmarks.full_width.measure rounds k2:pipeline:ring mlx:pipeline OPTIONS
    python -m benchmarks.full_width.measure loading OPTIONS
    python -m benchmarks.full_width.measure transfers OPTIONS
    python -m benchmarks.full_width.measure caching OPTIONS --rounds 1
    python -m benchmarks.full_width.measure table FILE...

OPTIONS are ``--model`` (for k2), ``--peer-model`` (for mlx-lm), ``--folder`` (logs, state, kernels)
and ``--out`` (results as JSON, rewritten after each step). ``start`` measures loading, the time
until ready and memory against the plan, cold and warm; ``rounds`` compares two programs on the
same cards in turn; ``table`` prints Markdown of any results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import word_prompt
from benchmarks.client import Ask
from benchmarks.full_width import gpus
from benchmarks.full_width.programs import K2Program, Program, Settings, make_program
from benchmarks.statistics import Answer, decode_rate, order_of_round, prefill_rate, ratios, summary

SHORT_PROMPT_TOKENS = 16
CHECK_PROMPT_TOKENS = 300
MAX_RESTARTS = 5
STEP_SECONDS = 300.0


class Results:
    """Results of one command, in a file that is rewritten after each step."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self._began = time.monotonic()
        self.data: dict[str, Any] = {"command": command, "machine": gpus.machine()}

    def put(self, key: str, value: Any) -> None:
        """Record a value, say it, and write the file."""
        self.data[key] = value
        self.data["seconds"] = round(time.monotonic() - self._began, 1)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.rename(self._path)
        say(f"{self.data['seconds']:6.1f} s  {key}: {json.dumps(value)[:400]}")


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# --- start --------------------------------------------------------------------------------------


def start(options: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Measure start, loading and memory of each program alone."""
    results.put("context_bytes", gpus.context_bytes(sys.executable, settings.folder / "gpu.log"))
    results.put("memory_before_bytes", gpus.used_bytes())
    for name in options.programs:
        if options.cold:
            results.put(f"{name} cold", _cold(name, settings))
        if not options.only_cold:
            results.put(f"{name} warm", _warm(name, settings, options))


def _cold(name: str, settings: Settings) -> dict[str, Any]:
    """Start with no compiled kernels, and ask the first requests of each kind."""
    fresh = replace(settings, folder=settings.folder / f"cold-{name.replace(':', '-')}")
    shutil.rmtree(fresh.folder, ignore_errors=True)
    fresh.folder.mkdir(parents=True)
    program = make_program(name, fresh)
    try:
        found = _started(program)
        for tokens in (SHORT_PROMPT_TOKENS, CHECK_PROMPT_TOKENS):
            (answer,) = program.ask([Ask(word_prompt(tokens, 7), 16)])
            found[f"first_{tokens}_token_request_seconds"] = answer.last
    finally:
        program.close()
    # The kernels serve the warm start, and the peer's: MLX compiles the same for both.
    for kernels in fresh.folder.glob("kernels-*"):
        shutil.copytree(kernels, settings.folder / kernels.name, dirs_exist_ok=True)
        for key in kernels.glob("**/ptx/*"):
            if key.name != "processes":
                shutil.copytree(key, settings.folder / "kernels-mlx", dirs_exist_ok=True)
    return found


def _started(program: Program) -> dict[str, Any]:
    seconds = program.start()
    found: dict[str, Any] = {"first_answer_seconds": seconds}
    found["ready_seconds"] = getattr(program, "ready_seconds", seconds)
    if isinstance(program, K2Program):
        for key in ("load_seconds", "bytes_read", "load_bytes_per_second"):
            found[key] = [rank[key] for rank in program.record["ranks"]]
        found["settings"] = program.record["settings"]
    return found


def _warm(name: str, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Start with compiled kernels, then do all work once and watch the memory."""
    program = make_program(name, settings)
    try:
        return _watched(program, options)
    finally:
        program.close()


def _watched(program: Program, options: argparse.Namespace) -> dict[str, Any]:
    """Start a program, do all work once, and return its start and the memory seen."""
    before = gpus.used_bytes()
    with gpus.Watch() as loading:
        found = _started(program)
    with gpus.Watch(program.pids()) as watch:
        for _, work, _ in works(options):
            work(program, 3)
    found["memory_before_bytes"] = before
    found["most_memory_while_loading_bytes"] = loading.most
    found["most_memory_bytes"] = watch.most
    if isinstance(program, K2Program):
        plan = program.plan()
        found["plan_bytes"] = [node["total_bytes"] for node in plan["nodes"]]
        found["layers"] = [rank["layers"] for rank in plan["placement"]["ranks"]]
        found["chunk_tokens"] = plan["request"]["prefill_chunk_tokens"]
    return found


# --- rounds -------------------------------------------------------------------------------------

Work = Callable[[Program, int], list[Answer]]


def works(options: argparse.Namespace) -> list[tuple[str, Work, Callable[[Any], float]]]:
    """Return the work that is measured: its name, its requests, its figure in tokens per second."""

    def decode(requests: int) -> Work:
        def ask(program: Program, seed: int) -> list[Answer]:
            prompts = [word_prompt(SHORT_PROMPT_TOKENS, 1000 * seed + n) for n in range(requests)]
            return program.ask([Ask(prompt, options.tokens) for prompt in prompts])

        return ask

    def prefill(tokens: int) -> Work:
        return lambda program, seed: program.ask([Ask(word_prompt(tokens, 1000 * seed + 50), 1)])

    found: list[tuple[str, Work, Callable[[Any], float]]] = []
    for requests in options.requests:
        found.append((f"decode {requests}", decode(requests), decode_rate))
    for tokens in options.prompts:
        found.append((f"prefill {tokens}", prefill(tokens), prefill_rate))
    return found


def rounds(options: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Start two programs, each of which does all work once, and measure them in turn, A B, B A.

    That first work does not count; the memory seen during it is in ``PROGRAM warm``.

    A program that ends during its work is started again; that work of that round counts for
    neither. ``restarts`` has the causes.
    """
    began = time.monotonic()
    results.put("context_bytes", gpus.context_bytes(sys.executable, settings.folder / "gpu.log"))
    programs = [make_program(name, settings) for name in options.programs]
    samples: dict[str, dict[str, list[float]]] = {}
    restarts: list[str] = []
    try:
        for program in programs:
            # The work that warms it up shows its memory: the programs before it are idle.
            results.put(f"{program.name} warm", _watched(program, options))
            program.hold()
        for number in range(options.rounds):
            one_began = time.monotonic()
            try:
                _round(programs, options, number, samples, restarts)
            finally:
                if restarts:
                    results.put("restarts", restarts)
            results.put("rounds", number + 1)
            results.put("samples", samples)
            results.put("figures", figures(samples, [each.name for each in programs]))
            took = time.monotonic() - one_began
            if time.monotonic() - began + 1.2 * took > options.limit_seconds:
                break
    finally:
        for program in programs:
            program.close()


def _round(
    programs: Sequence[Program],
    options: argparse.Namespace,
    number: int,
    samples: dict[str, dict[str, list[float]]],
    restarts: list[str],
) -> None:
    for name, work, figure in works(options):
        order = order_of_round(number) if len(programs) == 2 else range(len(programs))
        rates = {}
        for index in order:
            program = programs[index]
            program.let_go()
            try:
                rates[program.name] = figure(work(program, number + 10))
            except (RuntimeError, OSError) as error:
                restarts.append(f"{program.name}, {name}, round {number + 1}: {error}"[:500])
                if len(restarts) > MAX_RESTARTS:
                    raise
                program.close()
                program.start()
            finally:
                program.hold()
        if len(rates) == len(programs):
            for each, rate in rates.items():
                samples.setdefault(name, {}).setdefault(each, []).append(rate)


def figures(samples: dict[str, dict[str, list[float]]], programs: Sequence[str]) -> dict[str, Any]:
    """Summarise: median, least and most of each program, and of the ratio of the first two."""
    found: dict[str, Any] = {}
    for work, by_program in samples.items():
        entry: dict[str, Any] = {}
        for name, values in by_program.items():
            each = summary(values)
            entry[name] = {"median": each.median, "low": each.low, "high": each.high}
        if len(programs) == 2:
            both = ratios(by_program[programs[0]], by_program[programs[1]], more_is_better=True)
            entry["ratio"] = {"median": both.median, "low": both.low, "high": both.high}
        found[work] = entry
    return found


# --- loading and transfers, in processes of their own ---------------------------------------------


def loading(options: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Compare ways of loading the model on one rank, in turn."""
    _in_turn(
        "loading", options, [str(settings.model)], ("mlx", "k2", "k2-fresh", "k2-pinned"), results
    )


def caching(options: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Compare limits on the freed arrays that MLX keeps, on one GPU."""
    words = [str(settings.model), str(settings.context_length), *map(str, options.prompts)]
    _in_turn("caching", options, words, ("all",), results)


def transfers(options: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Compare sums and sends between two ranks, over the ring and over NCCL."""
    _in_turn("transfers", options, [str(settings.folder)], ("ring", "nccl"), results)


def _in_turn(
    module: str,
    options: argparse.Namespace,
    words: Sequence[str],
    ways: Sequence[str],
    results: Results,
) -> None:
    found: dict[str, list[Any]] = {}
    for number in range(options.rounds):
        for way in ways if number % 2 == 0 else tuple(reversed(ways)):
            command = [sys.executable, "-m", f"benchmarks.full_width.{module}", way, *words]
            found.setdefault(way, []).append(last_value(command))
            results.put(module, found)


def last_value(command: Sequence[str], limit_seconds: float = STEP_SECONDS) -> Any:
    """Run a command with all that it starts, and return the JSON of its last line, or an error."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            status: int | str = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            status = f"no end within {limit_seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # ranks may be left if one has failed
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        lines = output.read().splitlines()
        try:
            if status == 0:
                return json.loads(lines[-1])
        except (IndexError, ValueError):
            status = "the last line is not JSON"
        return {"error": f"{status}: {(errors.read() or ' '.join(lines))[-400:]}"}


# --- the command line -----------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="measure", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("start", "rounds", "loading", "transfers", "caching"):
        stage = stages.add_parser(name)
        if name in ("start", "rounds"):
            stage.add_argument("programs", nargs="+", help="such as k2:tensor:nccl, mlx:tensor")
        stage.add_argument("--model", type=Path, required=True)
        stage.add_argument("--peer-model", type=Path)
        stage.add_argument("--folder", type=Path, required=True)
        stage.add_argument("--out", type=Path, required=True)
        stage.add_argument("--rounds", type=int, default=5 if name == "rounds" else 3)
        stage.add_argument("--limit-seconds", type=float, default=570.0)
        stage.add_argument("--tokens", type=int, default=128, help="of each decoded answer")
        stage.add_argument("--requests", type=int, nargs="*", default=[1, 8])
        stage.add_argument("--prompts", type=int, nargs="*", default=[2048, 16_384])
        stage.add_argument("--context", type=int, default=20_480)
        stage.add_argument("--cold", action="store_true", help="first without compiled kernels")
        stage.add_argument("--only-cold", action="store_true", help="with --cold: no warm start")
    stages.add_parser("table").add_argument("files", nargs="+", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    options = _options(arguments)
    if options.stage == "table":
        from benchmarks.full_width.table import table

        say(table([json.loads(file.read_text()) for file in options.files]))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        options.model.absolute(),
        (options.peer_model or options.model).absolute(),
        options.folder.absolute(),
        options.context,
        max([*options.requests, 1]),
    )
    results = Results(options.out, " ".join(sys.argv[1:] if arguments is None else arguments))
    stages: dict[str, Callable[[argparse.Namespace, Settings, Results], None]] = {
        "start": start,
        "rounds": rounds,
        "loading": loading,
        "transfers": transfers,
        "caching": caching,
    }
    stages[options.stage](options, settings, results)
    results.put("done", True)


if __name__ == "__main__":
    main()
