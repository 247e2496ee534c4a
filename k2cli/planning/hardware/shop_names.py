"""Names of Macs as shops and their owners write them: ``Mac Studio M3 Ultra 512GB``."""

from __future__ import annotations

import re

# Products have words of chips in their names: a MacBook Pro may have an M4 Max.
_PRODUCT = re.compile(
    r"\b(apple|imac|mac[ -]?(studio|mini|pro)s?|mac ?books?[ -]?(pro|air)?s?|macs?)\b"
    r"|\b(20\d\d|\d\d[- ]?inch|\d\d\")"
)
_STORAGE = re.compile(r"\b\d+(\.\d+)? ?tb\b( ssd| storage)?|\b\d+ ?gb (ssd|storage)\b")
_GPU_CORES = re.compile(r"\b(\d{1,3})[- ]?cores? gpus?\b|\bgpu (\d{1,3})[- ]?cores?\b")
_CPU_CORES = re.compile(r"\b\d{1,3}[- ]?cores?( cpu| neural engine)?\b")
_CHIP = re.compile(r"\bm(\d{1,2})[ -]?(ultra|max|pro)?\b")
_MEMORY = re.compile(r"\b(\d{1,6}) ?(gb|gib|g)\b|\b(\d{1,6})\b")
_FILLING = re.compile(r"\b(with|and|of|unified|memory|ram|chip|a|the)\b|[()\[\],/·-]")


def plain_name(text: str) -> tuple[str, int | None]:
    """Return a machine's name in the catalog's form, and the cores of its GPU if it says them.

    ``Mac Studio M3 Ultra 512GB`` becomes ``m3-ultra-512``. A text with a word that is not
    understood is returned with hyphens in place of its spaces, since the word may matter.
    """
    unknown = re.sub(r"[\s_]+", "-", text.strip().lower())
    rest = re.sub(r"[\s_]+", " ", text.lower())
    cores = _GPU_CORES.search(rest)
    for pattern in (_GPU_CORES, _CPU_CORES, _STORAGE, _PRODUCT):
        rest = pattern.sub(" ", rest)
    chip = _CHIP.search(rest)
    if chip is None:
        return unknown, None
    rest = rest[: chip.start()] + " " + rest[chip.end() :]
    name = f"m{chip[1]}-{chip[2]}" if chip[2] else f"m{chip[1]}"
    memory = _MEMORY.search(rest)
    if memory is not None:
        rest = rest[: memory.start()] + " " + rest[memory.end() :]
        name += f"-{memory[1] or memory[3]}"
    if _FILLING.sub(" ", rest).strip():
        return unknown, None
    return name, int(cores[1] or cores[2]) if cores else None
