"""Make docs/design/speed-model.md and the package's constants.toml from a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from benchmarks.speed_fit.cuda import CudaOutcome
from benchmarks.speed_fit.cuda_section import cuda_section
from benchmarks.speed_fit.evaluate import Prediction, Spreads, Summary, summarise
from benchmarks.speed_fit.model import (
    COLLECTIVE,
    ENGINES,
    LINKS,
    PRIORS,
    SHARES,
    Constants,
    link_of,
)
from benchmarks.speed_fit.outcome import Outcome
from benchmarks.speed_fit.rows import QUANTITIES, Unusable

_INTRODUCTION = """# The speed model and how well it predicts

This page and the constants that `k2 plan-memory` uses are written by `scripts/fit-speed-model`; do
not edit them. A test runs the fit again and compares.

**Conclusion.** Of the published figures that the fit did not use, most are inside the predicted
band, and the typical error is small; see [the results](#results). What nobody has published is less
certain; see [what this does not show](#what-this-does-not-show).

## The model

The time of one token of one request, on one machine:

    (weights read + cache read) / (bandwidth x share)
      + attention over the context / (FLOPs x share) + layers x fixed cost

and the time of one chunk of a prompt:

    weights read / (bandwidth x share) + operations / (FLOPs x share)
      + attention / (FLOPs x share) + layers x fixed cost

* **Weights read** are traced from mlx-lm's own classes: all of attention, shared experts, norms and
  head, and those routed experts that the tokens of a step choose. If choices are even and
  independent, that is the fraction `1 - (1 - chosen/experts)^tokens` of the routed experts.
* **Cache read** is traced too: for each layer, what its cache keeps for a token, at most its
  window. If several query heads share a head of keys and values, MLX's kernel for a single query
  loads each byte once for each of them, mostly from the GPU's caches. Its time is then
  `cache read x query heads per key head / (bandwidth x loads)` if that is longer. *Loads*, as a
  multiple of the bandwidth, are fitted within what has been published: 1.7 to 4.5 for two dies, 3.1
  to 5.2 for one (`CACHE_LOADS_RANGE` in `planning/speed/constants.py` names the sources). The
  kernel was improved on 2026-01-22 (mlx PR 3023); MiniMax-M2.1's rows are older, and the slowest.
* **Attention to a prompt** is counted in operations, as mlx-lm computes it, and that of latent
  attention (Kimi K2, DeepSeek-V3) as k2 computes it: chunks of few tokens after a long context in
  the latent space, where nothing is expanded. Rows of others are predicted without that. After
  65,536 tokens, milliseconds measured on one full-width layer of K2 on an H200, and predicted for
  its attention: 16 tokens 1.9 and 1.5 (mlx-lm 15.3 and 14.4), 50 tokens 4.9 and 4.7 (16.0 and
  15.4), 160 tokens 12.7 and 15.1 (17.7 and 18.5). `plan-memory --explain` states the time of a
  follow-up of 50 tokens to what is cached. Attention in blocks of the context has the same
  operations and is predicted like attention without; measured, a layer takes 1.3 (65,536 tokens)
  to 2.1 times (8,192) as long on an H200. The plan has blocks only where memory asks for them.
* **Bandwidth and FLOPs** are the published figures of the chip; the *shares* are fitted. Chips with
  two dies (Ultra) have their own share of bandwidth.
* **Fixed cost** is the time of a layer that does not depend on its bytes: the launch of its many
  small operations. A layer with experts has more of them.
* **In a pipeline**, the time of one request is the sum of all stages, plus one message per stage
  and the way of the token back. With several requests all stages work at the same time, and the
  slowest one decides.
* **Tensor ranks** share the bytes of every layer, and wait for each other once per collective. The
  number of collectives is traced. Seconds per collective are an input (`--collective-latency`). The
  default is fitted within the range that has been published for RDMA over Thunderbolt 5, 26 to 200
  us; 300 us are assumed for TCP over Thunderbolt.
* **The band** is the expected value multiplied and divided by e^spread. The spread is the error
  that nine of ten rows do not exceed if no row of their source was used for the fit. The band is
  widened to cover the published range of collectives and of loads, and half and twice the fitted
  speed of attention; then its high is limited to twice its low. For the prefill of M5 chips it
  always has that width, because Apple published the figure of their neural accelerators for M5
  alone.

Engines differ. k2 computes with MLX, so `plan-memory` uses the constants of MLX rows (mlx-lm, exo,
oMLX and others that run mlx-lm's models). llama.cpp's rows have constants of their own. They show
that the form of the model is right; k2 does not use them.
"""

_RULES = """## The rows, and which were used for the fit

The rows are published measurements on Apple machines, one figure each, with their sources, in
`benchmarks/speed_fit/measurements.csv`. A row is used except in these cases:

* Its source states no speed, no format, or no parallelism although more than one is possible.
* The shapes of the model are not public, or mlx-lm has no such model.
* The model was paged, streamed from an SSD, used speculative decoding, or used an obsolete cache.
* Its prompt had fewer than 128 tokens.

If no context is stated, 512 tokens are assumed.

The division of the rows was fixed before the first fit. Rows of a kind (engine, decode or prefill,
one machine or several) are ordered by the SHA-256 of their id. The first, third, fifth and so on
are used for the fit; the others are **held out**. Neighbouring rows of one table resemble each
other, so two harder checks are made on all rows: five folds, and leaving out every source as a
whole. Rows from M200, of long contexts, were added on 2026-11-29. They are divided by themselves,
after the others, so that no other row changed sides, and have no say in the width of the band.

The rows from M200 are a weaker check than the others. The form of the loads, their prior and their
range were chosen with these rows in view: the slowest loads are computed from MiniMax-M2.1's two
rows, the fastest for two dies from Llama 3.1 405B's source. That M201 is inside its band (5.88 to
11.8 for 5.95) is therefore no independent evidence. Of sixteen rows that were tried, nine were
kept: with all seven more of one source, a row of Qwen3-30B fell out of its band.
"""

_MISSING = """## What this does not show

* No usable figure has been published for prefill over several machines, for M5, or for decode
  beyond 1,280 tokens of a model whose latent attention reads all of its context. There the model is
  only arithmetic.
* Contexts are assumed if a source does not state them. Six of the twelve figures of several
  machines are from one chart.
* Memory pressure is not modelled: a plan that does not fit has no speed.
* Of NVIDIA's GPUs only H200s were measured, with one model; see
  [that section](#gpus-of-nvidia).

Your own measurements are better. `k2 bench --calibrate` measures one of your runs at two prompt
lengths, generates after each, and repeats it with two requests at the same time. Then it solves the
model for the rates that give the measured figures. It keeps them in `calibration.json` of k2's
configuration, under the names and memory of the machines and the transport, and `plan-memory` uses
them for exactly these machines. Do it when the machines are idle. Before it starts, it says how
long it will take (at most two minutes, unless machines are very slow). Afterwards it says by how
much repetitions differed, and how far another calibration is likely to be from this one.
"""


def document(outcome: Outcome) -> str:
    """The whole page."""
    parts = [
        _INTRODUCTION,
        _RULES,
        _results(outcome),
        _constants(outcome.constants, outcome.spreads),
        _table("## Rows held out, predicted by constants fitted without them", outcome.held_out),
        _table("## Rows used for the fit", outcome.fitted),
        cuda_section(outcome.cuda),
        _unusable(outcome.unusable),
        _MISSING,
    ]
    return "\n".join(parts)


def _results(outcome: Outcome) -> str:
    kinds: list[tuple[str, Callable[[Prediction], bool]]] = [
        ("all", lambda one: True),
        ("MLX, decode", lambda one: _is(one, "mlx", "decode")),
        ("MLX, prefill", lambda one: _is(one, "mlx", "prefill")),
        ("MLX, several machines", lambda one: one.row.run.placement.size > 1),
        ("llama.cpp, decode", lambda one: _is(one, "llama.cpp", "decode")),
        ("llama.cpp, prefill", lambda one: _is(one, "llama.cpp", "prefill")),
    ]
    lines = [
        "## Results",
        "",
        "Targets for rows that the fit did not use: at least 80 % inside the band, a band whose",
        "high is at most twice its low, and a median error of at most 30 %.",
        "",
        "| rows | held out: figures | inside | median error | widest band |"
        " five folds: inside | median error | without own source: inside | median error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, wanted in kinds:
        held, folds, sources = (
            _summary(filter(wanted, rows))
            for rows in (outcome.held_out, outcome.folds, outcome.sources)
        )
        lines.append(
            f"| {name} | {held.count} | {held.inside:.0%} | {held.median_error:.1%} | "
            f"{held.widest:.2f} | {folds.inside:.0%} | {folds.median_error:.1%} | "
            f"{sources.inside:.0%} | {sources.median_error:.1%} |"
        )
    return "\n".join([*lines, ""])


def _is(one: Prediction, engine: str, quantity: str) -> bool:
    return one.row.engine == engine and one.row.quantity == quantity


def _summary(rows: Iterable[Prediction]) -> Summary:
    return summarise(list(rows))


def _constants(constants: Constants, spreads: Spreads) -> str:
    lines = [
        "## Constants",
        "",
        "The prior was fixed before the fit, except that of loads. It has little weight if there",
        "are rows; the other columns are the fitted values.",
        "",
        "| constant | prior | MLX | llama.cpp |",
        "| --- | --- | --- | --- |",
    ]
    for name in SHARES:
        values = [_value(name, constants[f"{engine}.{name}"]) for engine in ENGINES]
        before = _value(name, PRIORS[f"mlx.{name}"].value)
        lines.append(f"| {_NAMES[name]} | {before} | {values[0]} | {values[1]} |")
    before = _value(COLLECTIVE, PRIORS[COLLECTIVE].value)
    lines += [
        f"| a collective over RDMA | {before} | {_value(COLLECTIVE, constants[COLLECTIVE])} | |",
        *(
            f"| spread of {quantity} | | "
            + " | ".join(f"{spreads[engine, quantity]:.3f}" for engine in ENGINES)
            + " |"
            for quantity in QUANTITIES
        ),
        "",
    ]
    return "\n".join(lines)


_NAMES = {
    "bandwidth_one_die": "share of bandwidth, one die",
    "bandwidth_two_dies": "share of bandwidth, two dies",
    "dense_compute": "share of FLOPs, dense matrices",
    "expert_compute": "share of FLOPs, experts",
    "attention_compute": "share of FLOPs, attention",
    "dense_layer_seconds": "fixed cost of a layer without experts",
    "expert_layer_seconds": "fixed cost of a layer with experts",
    "cache_loads_one_die": "loads of keys and values, times the bandwidth, one die",
    "cache_loads_two_dies": "loads of keys and values, times the bandwidth, two dies",
}


def _value(name: str, value: float) -> str:
    if name.startswith("cache_loads"):
        return f"{value:.2f}"
    return f"{value * 1e6:.0f} us" if "seconds" in name else f"{value:.1%}"


def _table(title: str, predictions: Sequence[Prediction]) -> str:
    lines = [
        title,
        "",
        "Tokens per second. `*`: something was assumed, see `measurements.csv`.",
        "",
        "| row | model | on | tokens before | figure | published | predicted | band | error | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(predictions, key=lambda each: (each.row.row, each.row.quantity)):
        row = one.row
        tokens = row.context_length if row.quantity == "decode" else row.prompt_tokens
        lines.append(
            f"| [{row.row}]({row.source}){'*' if row.assumed else ''} | {row.published_model} | "
            f"{row.where} | {tokens:,} | {row.quantity} | {row.value:.4g} | {one.expected:.4g} | "
            f"{one.low:.3g} to {one.high:.3g} | {one.error:+.0%} | "
            f"{'' if one.inside else 'outside'} |"
        )
    return "\n".join([*lines, ""])


def _unusable(rows: Sequence[Unusable]) -> str:
    lines = [
        "## Rows that cannot be used, and why",
        "",
        "| row | model | why |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        linked = f"[{row.row}]({row.source})" if row.source.startswith("http") else row.row
        lines.append(f"| {linked} | {row.published_model} | {row.reason} |")
    return "\n".join([*lines, ""])


def constants_toml(outcome: Outcome, fitted_on: str) -> str:
    """The package's constants."""
    lines = [
        "# Written by scripts/fit-speed-model; docs/design/speed-model.md says from what, and",
        "# how well it predicts. Shares are of a chip's published peaks, seconds of a layer or a",
        "# collective.",
        f'fitted_on = "{fitted_on}"',
        f'digest = "{outcome.digest}"',
        "",
        "[mlx]",
        *(f"{name} = {outcome.constants[f'mlx.{name}']:.3g}" for name in SHARES),
    ]
    links = {name: link_of(outcome.constants, name) for name in LINKS} | outcome.cuda.links
    for name, link in links.items():
        lines += [
            "",
            f"[links.{name}]",
            f"collective_seconds_low = {link.collective_seconds_low:.3g}",
            f"collective_seconds = {link.collective_seconds:.3g}",
            f"collective_seconds_high = {link.collective_seconds_high:.3g}",
            f"bytes_per_second = {link.bytes_per_second:.3g}",
        ]
    lines += [
        "",
        "[band]",
        *(f"{name}_spread = {outcome.spreads['mlx', name]}" for name in QUANTITIES),
        *_cuda_toml(outcome.cuda),
    ]
    return "\n".join([*lines, ""])


def _cuda_toml(cuda: CudaOutcome) -> list[str]:
    about = cuda.about
    return [
        "",
        "# MLX on NVIDIA's GPUs, from figures of the machines named. The links nccl-pcie and",
        "# nccl-network are assumed.",
        "[cuda]",
        f'machines = ["{about["machine"]}"]',
        f'chips = ["{about["chip"]}"]',
        f'measured_on = "{about["measured_on"]}"',
        f'remark = "{about["remark"]}"',
        f"spread = {cuda.spread}",
        "",
        "[cuda.shares]",
        *(
            f"{name} = {value:.3g}"
            for name, value in asdict(cuda.shares).items()
            if value is not None
        ),
    ]
