"""The catalog of NVIDIA GPUs: memory, published speed, and the links between GPUs of a host.

``nvidia.toml`` holds the data, with its sources.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.units import GB, MIB

# Words of shops and of nvidia-smi that do not tell one card of the catalog from another.
_FILLING = re.compile(
    r"nvidia|geforce|gpu|gpus|graphics|card|tensor|core|blackwell|hopper|ampere|ada|lovelace"
    r"|workstation|server|founders|edition|max|q|sxm\d?|nvl|hbm\d?e?|gddr\d?x?|vram|memory"
    r"|desktop|grace|superchip"
)


@dataclass(frozen=True, slots=True)
class CardMemory:
    """A size that is sold: ``gb`` as people write it, ``mib`` as nvidia-smi shows it."""

    gb: int
    mib: int
    bandwidth_gb_per_second: int

    @property
    def bytes(self) -> int:
        return self.mib * MIB

    @property
    def bandwidth_bytes_per_second(self) -> int:
        return self.bandwidth_gb_per_second * GB


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of GPU. ``nvlink_gb_per_second`` is one direction of NVLink, None without it.

    ``unified`` is a machine of its own, whose GPU shares the memory of its processor; others can be
    several in one host. ``devices`` are names in nvidia-smi.
    """

    identifier: str
    name: str
    year: int
    memory: tuple[CardMemory, ...]
    bf16_tflops: float
    devices: tuple[str, ...]
    source: str
    aliases: tuple[str, ...] = ()
    nvlink_gb_per_second: int | None = None
    unified: bool = False

    @property
    def flops_per_second(self) -> int:
        """Published operations per second in bfloat16."""
        return round(self.bf16_tflops * 1e12)

    @property
    def specifications(self) -> list[str]:
        """The terms of ``--hardware`` for this card: ``a100-40``, ``a100-80``."""
        return [f"{self.identifier}-{size.gb}" for size in self.memory]

    def size(self, gb: int) -> CardMemory | None:
        """Return the memory of that size, if it is sold."""
        return next((size for size in self.memory if size.gb == gb), None)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "nvidia.toml").read_text(encoding="utf-8"))


@functools.cache
def cards() -> dict[str, Card]:
    """Return all cards of the catalog by identifier, such as ``h200``."""
    return {name: _card(name, fields) for name, fields in _table()["cards"].items()}


def _card(identifier: str, fields: dict[str, Any]) -> Card:
    lists = {name: tuple(fields.get(name, ())) for name in ("devices", "aliases")}
    memory = tuple(CardMemory(**size) for size in fields["memory"])
    return Card(identifier, **{**fields, **lists, "memory": memory})


def reserved_bytes() -> int:
    """Return the memory of a card that the driver keeps for itself (assumed)."""
    return int(_table()["reserved_mib"]) * MIB


def find_card(name: str) -> tuple[Card, int | None] | None:
    """Find the card that a term of ``--hardware`` names, and the gigabytes if it gives them.

    Args:
        name: in lower case, with ``-`` for spaces: ``h200-141``, ``nvidia-geforce-rtx-5090``.
    """
    known = {alias: card for card in cards().values() for alias in (card.identifier, *card.aliases)}
    # A name of nvidia-smi; several sizes of one card may differ in their names.
    for card in cards().values():
        if name in (_hyphened(device) for device in card.devices) and len(card.memory) == 1:
            return card, None
    text = re.sub(r"\brtx(?=\d)", "rtx-", name)
    memory = re.search(r"-(\d{1,6})-?(?:gb|gib|g)(?=-|$)", text)
    if memory is None:
        memory = re.search(r"-(\d{1,6})$", text) if text not in known else None
    sizes = [None] if memory is None else [int(memory[1]), None]
    for gb in sizes:
        rest = text if gb is None or memory is None else text.replace(memory[0], "", 1)
        words = [word for word in rest.split("-") if word and _FILLING.fullmatch(word) is None]
        for plain in (rest, "-".join(words), "-".join(each for each in words if each != "pcie")):
            if plain in known:
                return known[plain], gb
    return None


def _hyphened(device_name: str) -> str:
    return re.sub(r"\s+", "-", device_name.lower())


def card_of_device(device_name: str, memory_bytes: int) -> tuple[Card, CardMemory] | None:
    """Return the card of a name in nvidia-smi with the nearest memory; None if not listed."""
    for card in cards().values():
        if device_name in card.devices:
            return card, min(card.memory, key=lambda size: abs(size.bytes - memory_bytes))
    return None


def card_of_chip(chip: str) -> Card | None:
    """Return the card that a machine's ``chip`` names; None for Apple's and unknown ones."""
    return cards().get(chip)
