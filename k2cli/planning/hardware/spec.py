"""The value of ``--hardware``, such as ``2x m3-ultra-512``, ``2x h200-141``, ``this``."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from k2cli.errors import UsageError
from k2cli.planning.hardware.cards import (
    Card,
    CardMemory,
    card_of_chip,
    cards,
    find_card,
    reserved_bytes,
)
from k2cli.planning.hardware.chips import Chip, apple_gpu_limit, chips, never_made
from k2cli.planning.hardware.gpus import CONTEXT_BYTES, Gpu
from k2cli.planning.hardware.machine import (
    GIVEN,
    OS_RESERVE_BYTES,
    OS_RESERVE_SHARE,
    NodeMemory,
    this_machine,
)
from k2cli.planning.hardware.shop_names import plain_name
from k2cli.units import GIB, format_bytes, parse_bytes

# A count ("2x", "2"), and a machine, whose size may come first ("512GB M3 Ultra").
_SIZE = r"\d+[ -]?(?:gb|gib|inch)\b"
_TERM_PATTERN = re.compile(
    rf"(?:(\d{{1,6}})\s*[xX×*]\s*|(\d{{1,2}})\s+(?=[A-Za-z])(?!gb|gib|inch))?"
    rf"((?:[A-Za-z]|{_SIZE})[\w.\-\"(), /]*?)",
    re.IGNORECASE,
)
# Settings follow a colon or a comma; a shop's name has commas of its own.
_SETTING_START = re.compile(r":|,(?=[^,:]*=)")
_CHIP_PATTERN = re.compile(r"(?P<chip>.+?)-(?P<memory>\d{1,6})(?:gb|gib)?")
_FLOPS_PATTERN = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*T(?:FLOPS?|FLOP/s)?", re.IGNORECASE)
# Lists and counts of another form, for the hint of an error.
_OTHER_LIST = re.compile(r"\+|&|;|,(?![^,:+]*=)|\band\b", re.IGNORECASE)
_COUNT_BEHIND = re.compile(
    r"([A-Za-z].*?)\s*(?:\b[xX×*]\s*(\d{1,2})|\(\s*[xX×*]?\s*(\d{1,2})\s*[xX×*]?\s*\))"
)
_MAX_MACHINES = 64
_MAX_LENGTH = 4096
_EXAMPLE = "write for example --hardware '2x m3-ultra-512' or --hardware this"
_THIS = ("this", "localhost")
_KEYS = ("memory", "limit", "bandwidth", "flops", "gpu")


def parse_hardware(spec: str) -> list[NodeMemory]:
    """Read a specification such as ``2x m3-ultra-512``, ``m3-ultra-512 + m4-max-128``, ``this``.

    Names as shops write them, such as ``2 Mac Studio M3 Ultra 512GB``, are understood, too.

    Settings that differ from the catalog follow a machine, each after a colon or comma:
    ``limit=120GiB`` (what the GPU may use), ``memory=128GiB``, ``bandwidth=546GB/s``,
    ``flops=18.4TFLOPS``, ``gpu=40`` (cores). NVIDIA's cards need their memory only if there are
    several sizes; several cards are those of one host.

    Returns:
        One entry per rank. Machines of the catalog get names of their own (``m3-ultra-512/1``);
        ``2x this`` are two ranks on this machine, under one name.

    Raises:
        UsageError: if a term is malformed, names 0 machines, or names an unknown chip, memory
            option or key; the message says what there is.
    """
    if len(spec) > _MAX_LENGTH:
        raise UsageError(f"--hardware is {len(spec)} characters long", _EXAMPLE)
    try:
        counted = [_parse_term(term, spec) for term in spec.split("+")]
    except UsageError as error:
        written = rewritten(spec)
        if written is None:
            raise
        raise UsageError(str(error), f"--hardware {shlex.quote(written)}") from None
    total = sum(count for count, _ in counted)
    if total > _MAX_MACHINES:
        raise UsageError(
            f"'{spec}' names {total} machines, k2 plans at most {_MAX_MACHINES}", _EXAMPLE
        )
    return numbered([node for count, node in counted for _ in range(count)])


def rewritten(spec: str) -> str | None:
    """Return what a list of another form means, in the form that is read; None if that is unknown.

    Understood are a count behind the name (``h200 x2``), and lists with commas, semicolons, ``&``
    or ``and``. Of a card that is made with several sizes of memory the first is written.
    """
    terms = []
    parts = [part.strip() for part in _OTHER_LIST.split(spec)]
    counts_behind = any(map(_COUNT_BEHIND.fullmatch, parts))
    if len(parts) == len(spec.split("+")) and not counts_behind:
        return None  # the form is right: the error's own hint says more
    for part in parts:
        if not part:
            continue
        behind = _COUNT_BEHIND.fullmatch(part)
        count, name = (int(behind[2] or behind[3]), behind[1]) if behind else (1, part)
        term = _known_term(f"{count}x {name}" if count != 1 else name)
        if term is None:
            return None
        terms.append(term)
    written = " + ".join(terms)
    return written if terms and written != spec else None


def _known_term(term: str) -> str | None:
    """Return a term that is read, the given one or one with the memory that it lacks."""
    try:
        _parse_term(term, term)
    except UsageError as error:
        options = (error.hint or "").removeprefix("one of ").split(", ")
        match = _TERM_PATTERN.fullmatch(term)
        if match is None or not (error.hint or "").startswith("one of "):
            return None
        count = match[1] or match[2]
        return f"{count}x {options[0]}" if count else options[0]
    return term


def _parse_term(term: str, spec: str) -> tuple[int, NodeMemory]:
    machine, *settings = _SETTING_START.split(term.strip())
    match = _TERM_PATTERN.fullmatch(machine.strip())
    if match is None:
        raise _malformed(machine.strip(), spec)
    count = int(match[1] or match[2] or 1)
    if count == 0:
        raise UsageError(f"'{term.strip()}' names 0 machines", _EXAMPLE)
    name, cores = plain_name(match[3])
    wanted = _settings(settings, term.strip())
    cores = _positive(wanted.pop("gpu"), "gpu") if "gpu" in wanted else cores
    if name in _THIS:
        if cores is not None:
            raise UsageError("gpu= is for chips of the catalog, not for this machine")
        return count, _overridden(this_machine(), wanted)
    return count, _overridden(_catalog_machine(name, match[3], cores), wanted)


def _malformed(machine: str, spec: str) -> UsageError:
    """Return the error for a malformed term, which names its number if that is wrong."""
    counted = re.match(r"(\S+?)\s*[xX×*]\s*[A-Za-z]", machine)
    possible = counted and counted[1].isdecimal() and 0 < int(counted[1]) <= _MAX_MACHINES
    if counted and re.match(r"[-+.]?\d", counted[1]) and not possible:
        number = counted[1] if len(counted[1]) < 30 else f"{counted[1][:30]}..."
        return UsageError(f"k2 plans 1 to {_MAX_MACHINES} machines, not {number}", _EXAMPLE)
    named = [card for card in cards() if card.endswith(f"-{machine}")]
    hint = f"--hardware {named[0]}" if machine.isdecimal() and named else _EXAMPLE
    whole = f" in '{spec}'" if machine != spec.strip() else ""
    return UsageError(f"'{machine}'{whole} is not a hardware specification", hint)


def _catalog_machine(name: str, written: str, cores: int | None) -> NodeMemory:
    found = find_card(name)
    if found is not None:
        return _card_named(*found, written, cores)
    match = _CHIP_PATTERN.fullmatch(name)
    identifier = match.group("chip") if match else name
    chip = chips().get(identifier)
    if chip is None:
        hint = never_made(identifier) or _similar(name)
        raise UsageError(f"unknown hardware '{written}'", hint)
    options = ", ".join(f"{chip.identifier}-{size}" for size in chip.memory_gib)
    if match is None:
        raise UsageError(f"'{written}' lacks the memory size", f"one of {options}")
    size = int(match.group("memory"))
    if size not in chip.memory_gib:
        raise UsageError(f"there is no {chip.name} with {size} GB of memory", f"one of {options}")
    if cores is not None and cores not in chip.gpu_cores:
        sizes = " or ".join(f"gpu={each}" for each in chip.gpu_cores)
        raise UsageError(f"there is no {chip.name} with {cores} GPU cores", f"{sizes}")
    return catalog_node(chip, size, cores)


def _card_named(card: Card, gb: int | None, written: str, cores: int | None) -> NodeMemory:
    one_of = f"one of {', '.join(card.specifications)}"
    if cores is not None:
        raise UsageError("gpu= is for Apple's chips, not for NVIDIA's cards")
    if gb is None and len(card.memory) > 1:
        raise UsageError(f"'{written}' lacks the memory size", one_of)
    size = card.memory[0] if gb is None else card.size(gb)
    if size is None:
        raise UsageError(f"there is no {card.name} with {gb} GB of memory", one_of)
    return card_node(card, size)


def card_node(card: Card, size: CardMemory) -> NodeMemory:
    """Return a GPU of the catalog, with an assumed limit."""
    kept = reserved_bytes()
    why = "the driver"
    if card.unified:
        kept = max(OS_RESERVE_BYTES, int(size.bytes * OS_RESERVE_SHARE))
        why = "the system"
    return NodeMemory(
        name=f"{card.identifier}-{size.gb}",
        memory_bytes=size.bytes,
        limit_bytes=size.bytes - kept - CONTEXT_BYTES,
        limit_mark="assumed",
        device="cuda",
        limit_source=f"memory less {format_bytes(kept)} for {why} and "
        f"{format_bytes(CONTEXT_BYTES)} for the CUDA context",
        chip=card.identifier,
        bandwidth_bytes_per_second=size.bandwidth_bytes_per_second,
        gpu_flops_per_second=card.flops_per_second,
    )


def catalog_node(chip: Chip, memory_gib: int, gpu_cores: int | None = None) -> NodeMemory:
    """Return a machine of the catalog, with an assumed GPU limit."""
    limit, source = apple_gpu_limit(memory_gib)
    cores = gpu_cores or chip.usual_gpu_cores(memory_gib)
    sold = chip.sold(memory_gib)
    return NodeMemory(
        name=f"{chip.identifier}-{memory_gib}",
        memory_bytes=memory_gib * GIB,
        limit_bytes=limit,
        limit_mark="assumed",
        device="metal",
        limit_source=source,
        chip=chip.identifier,
        bandwidth_bytes_per_second=chip.bandwidth_bytes_per_second(cores, memory_gib),
        gpu_flops_per_second=chip.flops_per_second(cores),
        price_usd=sold.price_usd if sold is not None and sold.gpu_cores == cores else None,
    )


def _similar(name: str) -> str:
    machines = [f"{c.identifier}-{size}" for c in chips().values() for size in c.memory_gib]
    machines += [term for card in cards().values() for term in card.specifications]
    close = difflib.get_close_matches(name, machines, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return (
        f"known chips: {', '.join([*chips(), *cards()])}, each with its memory, "
        "as in --hardware '2x m3-ultra-512'; or --hardware this"
    )


# --- machines written as --hardware reads them ----------------------------------------------------


def numbered(nodes: Sequence[NodeMemory]) -> list[NodeMemory]:
    """Give machines of the catalog names of their own: ``m3-ultra-512/1``, ``m3-ultra-512/2``.

    Ranks on this machine keep its name, and so share it.
    """
    plain = [node.name.partition("/")[0] for node in nodes]
    return [
        replace(
            node,
            name=name
            if name == _THIS[1] or plain.count(name) == 1
            else f"{name}/{plain[: i + 1].count(name)}",
        )
        for i, (node, name) in enumerate(zip(nodes, plain, strict=True))
    ]


def hardware_text(nodes: Sequence[NodeMemory]) -> str | None:
    """Return the value of ``--hardware`` for these machines; None if one is not of the catalog.

    Of changed settings only the limit is written; a machine with others counts as not listed.
    """
    terms: list[tuple[str, int]] = []
    for node in nodes:
        term = _term(node)
        if term is None:
            return None
        if terms and terms[-1][0] == term:
            terms[-1] = (term, terms[-1][1] + 1)
        else:
            terms.append((term, 1))
    return " + ".join(f"{count}x {term}" if count > 1 else term for term, count in terms)


def _term(node: NodeMemory) -> str | None:
    listed = _listed(node)
    if listed is None:
        return None
    if node.name.partition("/")[0] != listed.name:
        return None
    same = replace(node, name=listed.name, limit_bytes=0, limit_mark="exact", limit_source="")
    if same != replace(listed, limit_bytes=0, limit_mark="exact", limit_source=""):
        return None
    if node.limit_bytes == listed.limit_bytes:
        return listed.name
    return f"{listed.name}:limit={node.limit_bytes // GIB}GiB"


def _listed(node: NodeMemory) -> NodeMemory | None:
    """Return the machine of the catalog with this one's chip and memory."""
    card = card_of_chip(node.chip)
    if card is not None:
        sizes = [size for size in card.memory if size.bytes == node.memory_bytes]
        return card_node(card, sizes[0]) if sizes else None
    chip, size = chips().get(node.chip), node.memory_bytes // GIB
    return None if chip is None or size not in chip.memory_gib else catalog_node(chip, size)


# --- the settings of a machine --------------------------------------------------------------------


def _settings(parts: list[str], term: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for part in parts:
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if key not in _KEYS or not separator:
            raise UsageError(
                f"'{part.strip()}' in '{term}' is not a setting of a machine",
                f"known ones are {', '.join(f'{key}=' for key in _KEYS)}, "
                "as in m4-max-128:bandwidth=546GB/s",
            )
        if key in settings:
            raise UsageError(f"'{term}' sets {key}= twice")
        settings[key] = value
    return settings


def _overridden(node: NodeMemory, settings: dict[str, str]) -> NodeMemory:
    """Return the machine with the user's settings."""
    if "memory" in settings:
        memory = _size(settings["memory"], "memory")
        limit, source = apple_gpu_limit(max(1, memory // GIB))
        if node.device != "metal":
            limit, source = min(node.limit_bytes, memory), node.limit_source
        node = replace(
            node,
            memory_bytes=memory,
            limit_bytes=min(limit, memory),
            limit_mark="assumed",
            limit_source=source,
            price_usd=None,
            gpus=_limited(node.gpus, memory, limit),
        )
    if "limit" in settings:
        limit = _size(settings["limit"], "limit")
        if limit > node.memory_bytes:
            raise UsageError(
                f"limit={settings['limit']} is more than the {node.memory_bytes // GIB} GiB of "
                f"{node.name}",
                f"--hardware '{node.name}:limit={node.limit_bytes // GIB}GiB'",
            )
        node = replace(
            node,
            limit_bytes=limit,
            limit_mark="assumed",
            limit_source=GIVEN,
            gpus=_limited(node.gpus, node.memory_bytes, limit),
        )
    if "bandwidth" in settings:
        text = re.sub(r"\s*(/s|ps)$", "", settings["bandwidth"], flags=re.IGNORECASE)
        node = replace(node, bandwidth_bytes_per_second=_size(text, "bandwidth"))
    if "flops" in settings:
        match = _FLOPS_PATTERN.fullmatch(settings["flops"])
        if match is None or float(match.group(1)) == 0:
            raise UsageError(
                f"flops={settings['flops']} is not the speed of a GPU",
                "write for example flops=18.4T",
            )
        node = replace(node, gpu_flops_per_second=round(float(match.group(1)) * 1e12))
    return node


def _limited(gpus: Sequence[Gpu], memory: int, limit: int) -> tuple[Gpu, ...]:
    """Return the GPUs of this machine with the user's memory and limit."""
    return tuple(replace(gpu, memory_bytes=memory, limit_bytes=limit) for gpu in gpus)


def _size(text: str, key: str) -> int:
    try:
        size = parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{key}={text} is not a size", error.hint) from error
    if not 0 < size < 2**60:
        raise UsageError(f"{key}={text} is not a possible size", "write for example 128GiB")
    return size


def _positive(text: str, key: str) -> int:
    if not text.isdecimal() or len(text) > 6 or int(text) == 0:
        raise UsageError(f"{key}={text} is not a number of cores", f"{key}=40")
    return int(text)
