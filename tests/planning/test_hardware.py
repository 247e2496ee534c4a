from __future__ import annotations

import psutil
import pytest

from k2cli.errors import UsageError
from k2cli.planning.hardware import (
    apple_gpu_limit,
    chips,
    parse_hardware,
    share_machines,
    this_machine,
)
from k2cli.units import GIB


def test_machines_of_the_catalog_have_gib_and_names_of_their_own() -> None:
    nodes = parse_hardware("2x m3-ultra-512 + M4 Max 128GB")
    assert [node.name for node in nodes] == ["m3-ultra-512/1", "m3-ultra-512/2", "m4-max-128"]
    assert nodes[0].memory_bytes == 512 * GIB
    assert nodes[0].limit_bytes == 498_216_210_000
    assert {node.limit_mark for node in nodes} == {"assumed"}
    assert {node.backend for node in nodes} == {"metal"}


def test_every_option_of_every_chip_parses_and_has_a_limit_within_its_memory() -> None:
    for chip in chips().values():
        for size in chip.memory_gib:
            (node,) = parse_hardware(f"{chip.identifier}-{size}")
            assert size * GIB // 2 < node.limit_bytes < node.memory_bytes == size * GIB


def test_more_memory_never_has_a_lower_limit() -> None:
    limits = [apple_gpu_limit(size)[0] for size in range(8, 1024)]
    assert limits == sorted(limits)


def test_this_machine_is_measured_and_shared_by_its_ranks() -> None:
    one, two = parse_hardware("2x this")
    assert one == two == this_machine()
    assert one.memory_bytes <= psutil.virtual_memory().total
    assert 0 < one.limit_bytes <= one.memory_bytes
    halves = share_machines([one, two])
    assert [half.limit_bytes for half in halves] == [one.limit_bytes // 2] * 2
    assert share_machines(parse_hardware("localhost")) == [one]


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("0x m3-ultra-512", "'0x m3-ultra-512' counts no machine", "2x m3-ultra-512"),
        ("m3-utlra-512", "unknown hardware 'm3-utlra-512'", "did you mean m3-ultra-512"),
        ("rtx-4090", "unknown hardware 'rtx-4090'", "known chips: m1,"),
        ("m3-ultra-192", "no M3 Ultra with 192 GB", "m3-ultra-96, m3-ultra-256, m3-ultra-512"),
        ("m3-ultra", "does not say how much memory", "one of m3-ultra-96"),
        ("", "'' is not a hardware specification", "2x m3-ultra-512"),
        ("2x", "'2x' is not a hardware specification", "2x m3-ultra-512"),
        ("this + ", "is not a hardware specification", "2x m3-ultra-512"),
        ("-1x this", "is not a hardware specification", "2x m3-ultra-512"),
        ("1000x this", "names 1000 machines, at most 64", None),
        ("9" * 5000 + "x this", "is not a hardware specification", "2x m3-ultra-512"),
    ],
)
def test_wrong_specifications_are_named_with_what_there_is(
    spec: str, message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hardware(spec)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")
