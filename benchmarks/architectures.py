"""Make docs/measurements/architectures.md: which architectures of mlx-lm can be planned.

    scripts/architecture-table              # write the page from the recorded configs
    scripts/architecture-table --check      # 1 if the page is not up to date
    scripts/architecture-table --collect [TYPE...]    # record configs anew (needs transformers)

The configs are recorded in benchmarks/data/architectures.json, each with where it is from: a shape
that k2 carries, the defaults of transformers' config class (for most the sizes of the first
published model), those of mlx-lm's own, or sizes made up for want of these. All of them are cut
to a few layers. What is planned is what k2 does for a user, on two machines.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.architecture_values import GUESSES, LAYERS, MADE_UP, PATCHES
from k2cli.errors import K2Error
from k2cli.planning.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "measurements" / "architectures.md"
MACHINES, ONE_MACHINE = "2x m3-ultra-512", "m3-ultra-512"
_MOST_BYTES = 6 * 2**30
"""Limit on address space while configs are recorded, if an architecture allocates its weights."""

_LAYER_FIELDS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of planning an architecture: the forms that it can run in, or the reasons against.

    ``obstacles`` are by form; ``refusal`` is set if no plan can be made at all.
    """

    forms: tuple[str, ...]
    obstacles: tuple[tuple[str, str], ...]
    refusal: str | None


def examine(config: Mapping[str, Any]) -> Outcome:
    """Plan a config on two machines, and on one if two are not possible.

    Raises:
        Exception: any error that is not a ``K2Error``, since that is a bug in k2.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            compared = _plan(folder, MACHINES).alternatives
            forms = tuple(sorted({each.name for each in compared if each.possible}))
            obstacles = [(each.name, each.verdict) for each in compared if not each.possible]
        except K2Error as error:
            refusal = error.message
            try:
                _plan(folder, ONE_MACHINE)
            except K2Error:
                return Outcome((), (), _words(refusal, folder))
            forms, obstacles = ("single",), []
            for form in ("pipeline", "tensor"):
                obstacles.append((form, _obstacle(folder, form)))
    return Outcome(forms, tuple((form, _words(why, folder)) for form, why in obstacles), None)


def _plan(folder: str, machines: str, strategy: str = "auto") -> Plan:
    from k2cli.planning.hardware.spec import parse_hardware
    from k2cli.planning.planner import Planner
    from k2cli.planning.request import PlanRequest

    return Planner(folder).plan(parse_hardware(machines), PlanRequest(strategy))


def _obstacle(folder: str, form: str) -> str:
    try:
        _plan(folder, MACHINES, form)
    except K2Error as error:
        return error.message.removeprefix("tensor parallelism is not possible: ")
    return "does not fit"


def _words(message: str, folder: str) -> str:
    return " ".join(message.replace(f"{folder}/", "").split())


def recorded() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the recorded configs by model type, each with its origin."""
    document = json.loads(DATA.read_text(encoding="utf-8"))
    return {name: (entry["from"], entry["config"]) for name, entry in document.items()}


# --- the page -----------------------------------------------------------------------------------

_INTRODUCTION = """\
# Architectures

<!-- made by scripts/architecture-table -->

This page lists every model type for which the installed mlx-lm has a file. Each was planned on two
machines. The columns `Pipeline` and `Tensor` say whether k2 can divide it in that way, or why not;
each type that plans also runs on one machine. The sizes are those of the config named in the last
column, cut to a few layers. If tensor slices are not possible with these sizes, they may still be
possible for another model of the type.
"""


def page(outcomes: Mapping[str, Outcome]) -> str:
    """Return the whole page."""
    origins = {name: origin for name, (origin, _) in recorded().items()}
    planned = {name: each for name, each in outcomes.items() if each.refusal is None}
    refused = {name: each for name, each in outcomes.items() if each.refusal is not None}
    lines = [_INTRODUCTION, f"{len(planned)} plan, {len(refused)} do not.", ""]
    lines += ["## Those that plan", "", "| Model type | Pipeline | Tensor | Sizes of |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, each in planned.items():
        lines.append(f"| `{name}` | {_form(each, 'pipeline')} | {_form(each, 'tensor')} "
                     f"| {origins[name]} |")  # fmt: skip
    lines += [
        "",
        "## Those that do not",
        "",
        "| Model type | Why | Sizes of |",
        "| --- | --- | --- |",
    ]
    for name, each in refused.items():
        assert each.refusal is not None
        lines.append(f"| `{name}` | {_cell(each.refusal)} | {origins[name]} |")
    return "\n".join(lines) + "\n"


def _form(outcome: Outcome, form: str) -> str:
    if form in outcome.forms:
        return "yes"
    return _cell(dict(outcome.obstacles).get(form, "no"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- recording ----------------------------------------------------------------------------------


def collect(only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Choose for every model type, or those in ``only``, the first known config that plans."""
    from benchmarks.model_types import supported_model_types

    document: dict[str, dict[str, Any]] = {}
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    for model_type in supported_model_types():
        if only and model_type not in only:
            origin, config = recorded()[model_type]
            document[model_type] = {"from": origin, "config": config}
            continue
        document[model_type] = _choose(model_type)
        print(model_type, document[model_type]["from"], file=sys.stderr)  # noqa: T201
    return document


def _choose(model_type: str) -> dict[str, Any]:
    first: dict[str, Any] | None = None
    for origin, config in _known(model_type):
        for candidate in (_cut(config, LAYERS), config):
            filled, outcome = _filled({**candidate, **PATCHES.get(model_type, {})})
            made_up = "" if filled == candidate or origin == "made up" else ", some made up"
            entry = {"from": origin + made_up, "config": filled}
            first = first or entry
            if outcome.refusal is None:
                return entry
    assert first is not None
    return first


def _filled(config: Mapping[str, Any]) -> tuple[dict[str, Any], Outcome]:
    """Return a config with the fields that its class requires, and the result of planning it."""
    filled = dict(config)
    for _ in range(6):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            outcome = examine(filled)
        missing = re.search(r"(text_config in )?config\.json lacks (.*)", outcome.refusal or "")
        if missing is None:
            return filled, outcome
        nested = missing[1] is not None
        place = dict(filled["text_config"]) if nested else filled
        for name in re.findall(r"\w+", missing[2]):
            if name in {**MADE_UP, **GUESSES} and name not in place:
                place[name] = {**MADE_UP, **GUESSES}[name]
        if nested:
            filled["text_config"] = place
    return filled, outcome


def _known(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield configs of a model type, those of published models first."""
    for folder in sorted((ROOT / "k2cli" / "models" / "configs").glob("*/config.json")):
        config = json.loads(folder.read_text())
        if config["model_type"] == model_type:
            yield f"{folder.parent.name}, as k2 carries it", config
    if (config := _of_transformers(model_type)) is not None:
        yield "transformers' defaults", config
    if (config := _of_mlx_lm(model_type)) is not None:
        yield "mlx-lm's defaults", config
    yield "made up", {**MADE_UP, "model_type": model_type}
    text = {**MADE_UP, "model_type": "deepseek_v3" if model_type == "kimi_vl" else model_type}
    yield "made up", {"model_type": model_type, "text_config": text}


def _of_transformers(model_type: str) -> dict[str, Any] | None:
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    except Exception as error:  # any class of some hundred may want arguments of its own
        print(f"{model_type}: transformers: {error!r}"[:200], file=sys.stderr)  # noqa: T201
        return None
    config["model_type"] = model_type
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if isinstance(part.get("num_kv_shared_layers"), int):
                part["num_kv_shared_layers"] = min(part["num_kv_shared_layers"], 2)
            for name in ("vision_config", "audio_config", "id2label", "label2id"):
                part.pop(name, None)
            rope = part.get("rope_parameters")
            if isinstance(rope, dict):
                rope = rope.get("full_attention") or rope
                if "rope_theta" in rope:
                    part.setdefault("rope_theta", rope["rope_theta"])
            part.setdefault("rope_scaling", None)
    plain: dict[str, Any] = _plain(config)
    return plain


def _of_mlx_lm(model_type: str) -> dict[str, Any] | None:
    from k2cli.sharding.architectures import model_classes

    try:
        _, arguments = model_classes({"model_type": model_type})
    except K2Error:
        return None
    if not is_dataclass(arguments):
        return None
    defaults = {
        each.name: each.default
        for each in fields(arguments)
        if each.default is not MISSING and isinstance(each.default, int | float | str | bool)
    }
    return {**MADE_UP, **defaults, "model_type": model_type}


def _plain(value: Any) -> Any:
    """Return a config without fields that only transformers reads, to keep the record small."""
    dropped = ("transformers_version", "_name_or_path", "architectures", "chunk_size_feed_forward",
               "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
               "return_dict", "use_cache", "initializer_range")  # fmt: skip
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in dropped}
    return value


def _cut(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same sizes with fewer layers; lists with an entry per layer are cut too."""
    count = next((config[n] for n in _LAYER_FIELDS if isinstance(config.get(n), int)), None)
    if count is None or count <= layers:
        kept = dict(config)
        if isinstance(kept.get("text_config"), dict):
            kept["text_config"] = _cut(kept["text_config"], layers)
        return kept
    return {key: _cut_field(key, value, count, layers) for key, value in config.items()}


def _cut_field(key: str, value: Any, count: int, layers: int) -> Any:
    if key in _LAYER_FIELDS:
        return layers
    if isinstance(value, list) and len(value) == count:
        return value[:layers]
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        # Numbers of layers, as Kimi's linear_attn_config has them.
        return [each for each in value if each <= layers] if max(value) <= count else value
    if isinstance(value, dict):
        return {name: _cut_field(name, each, count, layers) for name, each in value.items()}
    return value


def main(arguments: Sequence[str]) -> int:
    """Write the page or the record, or compare the page; 1 if it is not up to date."""
    if arguments and arguments[0] == "--collect":
        entries = collect(arguments[1:]).items()
        lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in entries]
        DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return 0
    text = page({name: examine(config) for name, (_, config) in recorded().items()})
    if list(arguments) == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
