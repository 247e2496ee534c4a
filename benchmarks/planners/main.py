"""Make docs/measurements/planner-comparison.md, which compares k2's planner with others.

    scripts/compare-planners                       # install, run, write the page
    scripts/compare-planners --environments DIR    # keep the planners' environments, or use them

Every planner is installed with pip into an environment of its own and asked once, one after the
other, about the same sparse checkpoint. Those that read the Hub get one on this machine through
``HF_ENDPOINT``; where the Hub's address stands in a planner's code instead, it is replaced there,
which the page says. One that does not answer is listed with what it said. Peak memory is the
kernel's for the child (``ru_maxrss``), time is from the start of the process to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planners.hub import MODEL_ID, local_hub

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "measurements" / "planner-comparison.md"
CONTEXT = 131_072
KV_BYTES = 61 * (512 + 64) * 2 * CONTEXT
"""Latent and rotary key of 61 layers in bfloat16: K2's config.json."""
INSTALL_SECONDS = 300
ANSWER_SECONDS = 60
GIB, GB = 2**30, 10**9


@dataclass(frozen=True, slots=True)
class Planner:
    """Command line of a planner, and patterns that find sizes in its output, with units.

    ``hub_in`` is the module of it in whose files the Hub's address stands.
    """

    package: str
    command: tuple[str, ...]
    weights: tuple[str, int] | None = None
    cache: tuple[str, int] | None = None
    hub_in: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of one run; sizes in bytes, or a ``reason`` if it gave no answer."""

    name: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    reason: str = ""


NUMBER = r"\D*?([\d.]+(?:e[+-]?\d+)?)"
CTX = str(CONTEXT)
PLANNERS = (
    Planner("modelinfo-cli", ("modelinfo", "--context", CTX, "{shard}"),
            ("Weights:" + NUMBER, GIB), ("KV Cache:" + NUMBER, GIB)),
    Planner("llm-mem-planner",
            ("llm-mem", "--config", "{folder}/config.json", "--seq-len", CTX, "--batch", "1"),
            ("weights_unique:" + NUMBER, GIB), ("kv_unique=" + NUMBER, GIB)),
    Planner("ridgepoint",
            ("ridgepoint", "fit", MODEL_ID, "--gpu", "h100-80gb:16", "--ctx", CTX, "--json"),
            (r'"weights_bytes": \{"best":' + NUMBER, 1), ('"bytes_per_seq":' + NUMBER, 1)),
    Planner("vramscout",
            ("vramscout", MODEL_ID, "--context", CTX, "--vram-gib", "1024", "--json"),
            ('"Model weights / rank":' + NUMBER, GIB), ('"MLA latent cache":' + NUMBER, GIB)),
    Planner("mac-ai-doctor",
            ("mac-ai-doctor", "check", "{folder}", "--context", CTX, "--memory-gb", "512"),
            None, ("KV cache" + NUMBER, GB)),
    Planner("hf-mem",
            ("hf-mem", "--model-id", MODEL_ID, "--experimental", "--max-model-len", CTX),
            (r"MODEL \([^,]*," + NUMBER, GIB), (r"TOKENS," + NUMBER, GIB), "hf_mem"),
    Planner("llm-cal", ("llm-cal", MODEL_ID, "--gpu", "H100", "--context-length", CTX),
            ("safetensors bytes" + NUMBER, GB), (f"{CONTEXT:,} tokens" + NUMBER, GB), "llm_cal"),
    Planner("kvfit", ("kvfit", MODEL_ID, "--hardware", "custom:512", "--gpus", "2", "--json"),
            hub_in="kvfit"),
    Planner("llm-resource-planner", ("llm-plan", MODEL_ID, "--gpu", "512")),
)  # fmt: skip

NOT_ASKED = {
    "hf-vram-calc": "brings PyTorch; pip had not finished after 120 s",
    "accelerate estimate-memory": "needs PyTorch, as above; reports no KV cache",
    "llmfit": "reads its own catalog, no checkpoint",
}
"""Tried or looked at once, and why they are not among the planners above."""


def found(pattern: tuple[str, int] | None, output: str) -> int | None:
    """Bytes that a pattern finds in an output."""
    match = re.search(pattern[0], output) if pattern else None
    return round(float(match[1]) * pattern[1]) if match and pattern else None


def last_words(output: str) -> str:
    """The last line of an output that names an error, else that has words: 160 characters."""
    lines = [re.sub(r"[│╭╰─╮╯|`]+", " ", line).strip() for line in output.splitlines()]
    said = [line for line in lines if re.search(r"[A-Za-z]{3}", line)]
    errors = [line for line in said if re.search(r"error:|unsupported|unavailable", line, re.I)]
    return (errors or said or ["no output"])[-1][:160]


def measure(
    command: Sequence[str], variables: Mapping[str, str]
) -> tuple[int, str, float, float, int]:
    """Status, output, wall and CPU seconds and peak bytes of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **variables}, cwd=variables.get("HOME"),
        )  # fmt: skip
        timer = threading.Timer(ANSWER_SECONDS, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return process.returncode, text, seconds, cpu, usage.ru_maxrss * unit


def ask(planner: Planner, environment: Path, places: Mapping[str, str], hub: str) -> Answer:
    """Install a planner if it is not there yet, and ask it."""
    program = environment / "bin" / planner.command[0]
    if not program.exists():
        reason = install(planner.package, environment)
        if reason or not program.exists():
            return Answer(planner.package, reason=f"not installed: {reason or 'no program'}")
    name = f"{planner.package} {version(planner.package, environment)}"
    if planner.hub_in:
        name += " [1]"
        point_at(hub, environment, planner.hub_in)
    arguments = [word.format(**places) for word in planner.command[1:]]
    variables = {"HF_ENDPOINT": hub, "HOME": places["home"], "COLUMNS": "160"}
    status, text, seconds, cpu, peak = measure([str(program), *arguments], variables)
    weights, cache = found(planner.weights, text), found(planner.cache, text)
    reason = ""
    if status != 0 or (weights is None and cache is None):
        reason = f"exit {status}: {last_words(text)}"
        weights = cache = None
    return Answer(name, seconds, cpu, peak, weights, cache, reason)


def install(package: str, environment: Path) -> str:
    """Make an environment with a package; return an error, or an empty string."""
    venv.create(environment, with_pip=True)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"pip had not finished after {INSTALL_SECONDS} s"
    return last_words(done.stderr) if done.returncode else ""


def point_at(hub: str, environment: Path, module: str) -> None:
    """Put a Hub's address in place of the real one's (or of an older run's) in a module's files."""
    for file in environment.glob(f"lib/python*/site-packages/{module}/**/*.py"):
        text = file.read_text(encoding="utf-8")
        changed = re.sub(r"https://huggingface\.co|http://127\.0\.0\.1:\d+", hub, text)
        if changed != text:
            file.write_text(changed, encoding="utf-8")


def version(package: str, environment: Path) -> str:
    """The installed version, from the name of its metadata folder."""
    pattern = f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info"
    names = [path.name for path in environment.glob(pattern)]
    return names[0].removesuffix(".dist-info").rpartition("-")[2] if names else ""


def ask_k2(places: Mapping[str, str]) -> Answer:
    """k2's full plan of the same folder for two machines, every placement tried."""
    command = [sys.executable, "-m", "k2cli", "plan-memory", places["folder"], "--json",
               "--hardware", "2x m3-ultra-512", "--context", CTX]  # fmt: skip
    variables = {"PYTHONPATH": str(ROOT)}
    status, text, seconds, cpu, peak = measure(command, variables)
    try:
        document = json.loads(text[text.index("{") :])
        weights = int(document["model"]["stored_bytes"])
        cache = max(int(node["kv_cache_bytes"]) for node in document["nodes"])
    except (ValueError, KeyError) as error:
        return Answer("k2", seconds, cpu, peak, reason=f"exit {status}: {error!r}")
    return Answer("k2 (full plan)", seconds, cpu, peak, weights, cache)


def size(value: int | None, truth: int) -> str:
    """A size in GB beside its error."""
    if value is None:
        return "–"
    percent = 100 * (value / truth - 1)
    return f"{value / GB:,.1f}" + ("" if abs(percent) < 0.5 else f" ({percent:+,.0f}%)")


def table(answers: Sequence[Answer], weights_bytes: int) -> str:
    """A row per planner that answered, then those that did not, with what they said."""
    lines = ["| planner | cold, s | of it CPU, s | peak RSS, MB | weights, GB | KV, GB |",
             "|---|---|---|---|---|---|",
             f"| truth | | | | {weights_bytes / GB:,.1f} | {KV_BYTES / GB:,.1f} |"]  # fmt: skip
    for answer in answers:
        if not answer.reason:
            weights = size(answer.weights_bytes, weights_bytes)
            lines.append(
                f"| {answer.name} | {answer.seconds:.2f} | {answer.cpu_seconds:.2f} | "
                f"{(answer.peak_bytes or 0) / 1e6:.0f} | {weights}"
                f" | {size(answer.cache_bytes, KV_BYTES)} |"
            )
    refused = [answer for answer in answers if answer.reason]
    if refused:
        lines += ["", "Did not answer:", ""]
        lines += [f"- {answer.name}: {answer.reason}" for answer in refused]
    return "\n".join(lines)


def not_asked() -> str:
    """Return the list of planners that are not in the table, with reasons."""
    return "\n".join(f"- {name}: {reason}" for name, reason in NOT_ASKED.items())


def page(answers: Sequence[Answer], truth: Mapping[str, Any], load: float) -> str:
    """The whole page."""
    return f"""# Planners compared

<!-- made by scripts/compare-planners -->

Each planner was asked about the 4-bit Kimi K2 with one sequence of {CONTEXT:,} tokens. The
checkpoint has {truth["tensors"]:,} tensors in {truth["shards"]} files,
{truth["weights_bytes"]:,} bytes. Its headers were made from k2's trace of mlx-lm's classes, so
every planner that reads headers must agree with k2 about the weights. Headers are exact; the data
are holes.

* Each planner ran once, one at a time, on {os.cpu_count()} CPU cores
  ({platform.system()} {platform.machine()}). The load before the runs was {load:.1f}, so wall time
  includes waiting; CPU time does not.
* **Cold** is the time from the start of the process to its end.
* Percentages are the error against the truth. A size within half a percent has none.
* A planner that knows GPUs and not Macs was given as many GPUs as it has names for. The columns do
  not depend on them.
* [1] reads only the real Hub. In its files the address of the Hub was replaced by that of a local
  server.

{table(answers, truth["weights_bytes"])}

Not asked:

{not_asked()}

The planners do not answer the same question. k2 tries every placement on two machines and models
activations, overhead, speed and headroom; the others give weights and cache for one machine or for
all together. k2's KV is that of the rank that holds most. k2's own limits are 3 s and 250 MB. The
folder only imitates a published repository, so an error here may not occur with the real files.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask all planners and write the page."""
    parser = argparse.ArgumentParser(description="Write docs/measurements/planner-comparison.md.")
    parser.add_argument("--environments", type=Path, help="where planners are or get installed")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary) / "k2", Path(temporary) / "home"
        home.mkdir()
        environments = (options.environments or Path(temporary) / "environments").resolve()
        # In a process of its own: a child's peak is at least what its parent held when it forked.
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.planners.checkpoint", str(folder)],
            check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        truth = json.loads(made.stdout)
        shard = sorted(folder.glob("*.safetensors"))[0]
        places = {"folder": str(folder), "shard": str(shard), "home": str(home)}
        load = os.getloadavg()[0]
        answers = [ask_k2(places)]
        with local_hub(folder) as hub:
            for planner in PLANNERS:
                sys.stderr.write(f"asking {planner.package} ...\n")
                answers.append(ask(planner, environments / planner.package, places, hub))
    options.output.write_text(page(answers, truth, load))
    sys.stdout.write(table(answers, truth["weights_bytes"]) + "\n")
    return 0
