"""The page of all models that k2 knows by name: docs/measurements/models.md.

    scripts/model-table            # write the page
    scripts/model-table --check    # 1 if the page is not up to date

Parameters, held bytes and KV bytes per token are traced from the shapes that k2 carries; stored
bytes are published ones where the catalog has any.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.models.catalog import CatalogEntry, HubSource, catalog, shapes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "measurements" / "models.md"

FAMILIES = {
    "Kimi": ("k2", "k3"),
    "DeepSeek": ("deepseek",),
    "GLM": ("glm",),
    "Qwen": ("qwen",),
    "Llama": ("llama", "nemotron-70b"),
    "MiniMax": ("minimax",),
    "Others": ("gpt-oss", "nemotron-3", "mimo"),
    "To try k2 with": ("demo",),
}
"""Headings, and what the aliases under them start with."""

_KV_CONTEXTS = (65_536, 131_072)
"""Two contexts, in tokens: far beyond any window, and whole steps of any cache."""

INTRODUCTION = """\
# Models that k2 knows by name

<!-- made by scripts/model-table -->

`k2 plan-memory ALIAS`, `k2 download ALIAS` and `k2 launch ALIAS` take these names, in any case.
Every other repository works as `owner/name`, and every folder or `.gguf` file as its path.

- **Parameters** are counted in the traced model: the language model without vision towers, and
  without the layers that predict several tokens at once, which mlx-lm does not load.
- **Stored** is the size of the repository's weights on the Hub, as published. With `~`, no exact
  size was published, and the size is computed from the shape. Published sizes include vision
  towers.
- **Held** is the memory of the loaded model, on all machines together.
- **KV** is the size of the cache for each token of context, at 16 bit, in bytes.
- `-`: k2 contains no shape of this model, because no public source of one was found. A plan then
  reads the config and the headers from the Hub (some kilobytes), and needs a connection once.
- `not in mlx-lm`: the installed mlx-lm has no class for this architecture, so k2 cannot run it. A
  plan says so.
"""


@dataclass(frozen=True, slots=True)
class Traced:
    """Figures traced from a shape. ``stored_bytes`` is computed."""

    parameters: int
    held_bytes: int
    stored_bytes: int
    kv_bytes_per_token: int
    context_length: int | None


def trace(entry: CatalogEntry) -> Traced:
    """Trace the shape that k2 carries for an alias.

    Raises:
        K2Error: if the installed mlx-lm cannot build it.
    """
    from k2cli.models.inspection import inspect_model
    from k2cli.planning.config_check import model_context_length

    assert entry.config_folder is not None
    quantization = tuple(entry.overrides.get("quantization", {}).items())
    parameters, kv_bytes_per_token = _whole(entry.config_folder)
    held, stored = _sizes(entry.config_folder, quantization)
    context = model_context_length(inspect_model(entry.alias).config)
    return Traced(parameters, held, stored, kv_bytes_per_token, context)


@functools.cache
def _whole(folder: Path) -> tuple[int, int]:
    """Return parameters, and growth of the cache per token beyond windows and fixed states."""
    from k2cli.models.checkpoint import read_config
    from k2cli.sharding.assemble import FLOAT_TYPES, build, cast
    from k2cli.sharding.profile import profile_model
    from k2cli.sharding.trace import parameters

    model = build(read_config(folder))
    count = sum(value.size for value in parameters(model).values())
    cast(model, FLOAT_TYPES["bfloat16"], kept=())
    profile = profile_model(model)
    shorter, longer = (sum(profile.cache_bytes(length)) for length in _KV_CONTEXTS)
    return count, (longer - shorter) // (_KV_CONTEXTS[1] - _KV_CONTEXTS[0])


@functools.cache
def _sizes(folder: Path, quantization: tuple[tuple[str, Any], ...]) -> tuple[int, int]:
    """Return bytes held, and bytes stored as computed from the config."""
    from k2cli.models.catalog import unsaid_fields
    from k2cli.models.checkpoint import read_config
    from k2cli.planning.memory.stored import original_quantization, stored_bytes_of_config
    from k2cli.sharding.assemble import config_dtype
    from k2cli.sharding.trace import parameters, trace_model

    unsaid = unsaid_fields(folder.name)
    config = {**read_config(folder), **unsaid}
    if quantization:
        config["quantization"] = dict(quantization)
    elif original_quantization(config) is None and "quantization" not in config and not unsaid:
        size = _whole(folder)[0] * config_dtype(config).size
        return size, size
    model = trace_model(config)
    stored, _ = stored_bytes_of_config(config, model)
    return sum(value.nbytes for value in parameters(model).values()), stored


def row(entry: CatalogEntry) -> str:
    """Return the table row of one alias."""
    repo = entry.source.repo if isinstance(entry.source, HubSource) else entry.source.package
    cells: list[Any] = [f"`{entry.alias}`", repo]
    traced = None
    if entry.config_folder is not None:
        try:
            traced = trace(entry)
        except K2Error:
            cells += ["not in mlx-lm", _stored(entry, None), "-", "-", "-"]
            return _line([*cells, _source(entry)])
    if traced is None:
        return _line([*cells, "-", _stored(entry, None), "-", "-", "-", _source(entry)])
    cells += [
        f"{traced.parameters / 1e9:,.1f} B", _stored(entry, traced), _gigabytes(traced.held_bytes),
        f"{traced.context_length:,}" if traced.context_length else "-",
        f"{traced.kv_bytes_per_token:,}",
    ]  # fmt: skip
    return _line([*cells, _source(entry)])


def _stored(entry: CatalogEntry, traced: Traced | None) -> str:
    if entry.stored_bytes is not None:
        size = _gigabytes(entry.stored_bytes)
        return f"[{size}]({entry.size_source.split()[0]})" if entry.size_source else size
    return f"~{_gigabytes(traced.stored_bytes)}" if traced is not None else "-"


def _source(entry: CatalogEntry) -> str:
    if entry.config_folder is None:
        return "-"
    return f"[{entry.config_folder.name}](#shapes)"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _shapes() -> Iterator[str]:
    yield from ("## Shapes", "")
    yield "Where each shape is from, and the published number of parameters it agrees with."
    yield ""
    yield _line(["Shape", "Source", "Published parameters", "Published in"])
    yield "| --- | --- | --- | --- |"
    for name, shape in sorted(shapes().items()):
        count = shape.published_parameters
        published = f"{count / 1e9:,.6g} B" if count is not None else "-"
        yield _line([name, shape.source, published, shape.published_in or "-"])


def page() -> str:
    """Return the whole page."""
    lines = [INTRODUCTION]
    for family, starts in FAMILIES.items():
        lines += [f"## {family}", ""]
        lines += [
            "| Alias | Repository | Parameters | Stored | Held | Context | KV per token | Shape |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += [row(entry) for entry in catalog().values() if entry.alias.startswith(starts)]
        lines.append("")
    return "\n".join([*lines, *_shapes()]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it; 1 if it is not up to date."""
    if list(arguments) == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
