from __future__ import annotations

import psutil
import pytest

from k2cli.errors import UsageError
from k2cli.planning.hardware.cards import card_of_device, cards
from k2cli.planning.hardware.chips import apple_gpu_limit, chips
from k2cli.planning.hardware.machine import share_machines, this_machine
from k2cli.planning.hardware.spec import hardware_text, parse_hardware
from k2cli.units import GIB


def test_machines_of_the_catalog_have_gib_and_names_of_their_own() -> None:
    nodes = parse_hardware("2x m3-ultra-512 + M4 Max 128GB")
    assert [node.name for node in nodes] == ["m3-ultra-512/1", "m3-ultra-512/2", "m4-max-128"]
    assert nodes[0].memory_bytes == 512 * GIB
    assert nodes[0].limit_bytes == 498_216_210_000
    assert {node.limit_mark for node in nodes} == {"assumed"}
    assert {node.device for node in nodes} == {"metal"}


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
        ("0x m3-ultra-512", "'0x m3-ultra-512' names 0 machines", "2x m3-ultra-512"),
        ("m3-utlra-512", "unknown hardware 'm3-utlra-512'", "did you mean m3-ultra-512"),
        ("gtx-1080", "unknown hardware 'gtx-1080'", "known chips: m1,"),
        ("a100", "'a100' lacks the memory size", "one of a100-40, a100-80"),
        ("h200-80", "no H200 with 80 GB of memory", "one of h200-141"),
        ("rtx-5090:gpu=4", "gpu= is for Apple's chips", None),
        ("m3-ultra-192", "no M3 Ultra with 192 GB", "m3-ultra-96, m3-ultra-256, m3-ultra-512"),
        ("m3-ultra", "'m3-ultra' lacks the memory size", "one of m3-ultra-96"),
        ("", "'' is not a hardware specification", "2x m3-ultra-512"),
        ("2x", "'2x' is not a hardware specification", "2x m3-ultra-512"),
        ("this + ", "is not a hardware specification", "2x m3-ultra-512"),
        ("-1x this", "k2 plans 1 to 64 machines, not -1", "2x m3-ultra-512"),
        ("1000x this", "names 1000 machines, k2 plans at most 64", None),
        ("9" * 4000 + "x this", "k2 plans 1 to 64 machines, not 999", "2x m3-ultra-512"),
        ("9" * 5000 + "x this", "--hardware is 5006 characters long", "2x m3-ultra-512"),
        ("m4-ultra-256", "unknown hardware 'm4-ultra-256'", "Apple never made an M4 Ultra"),
        ("m4-max-128:speed=9", "'speed=9' in 'm4-max-128:speed=9' is not a setting", "bandwidth="),
        ("m4-max-128:limit", "'limit' in", "known ones are memory=, limit="),
        ("m4-max-128:limit=200GiB", "limit=200GiB is more than the 128 GiB", None),
        ("m4-max-128:limit=0", "limit=0 is not a possible size", "128GiB"),
        ("m4-max-128:limit=1GB:limit=2GB", "sets limit= twice", None),
        ("m4-max-128:bandwidth=fast", "bandwidth=fast is not a size", "512GB"),
        ("m4-max-128:flops=0T", "flops=0T is not the speed of a GPU", "flops=18.4T"),
        ("m4-max-128:gpu=41", "no M4 Max with 41 GPU cores", "gpu=32 or gpu=40"),
        ("this:gpu=4", "gpu= is for chips of the catalog", None),
    ],
)
def test_wrong_specifications_are_named_with_what_there_is(
    spec: str, message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hardware(spec)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_a_machine_of_the_catalog_has_speed_price_and_what_differs_from_it() -> None:
    plain, wider, limited, smaller = parse_hardware(
        "m4-max-128 + m4-max-128:bandwidth=600GB/s:flops=20T + m4-max-128:limit=120GiB"
        " + m4-max-36,gpu=40"
    )
    assert (plain.chip, plain.bandwidth_bytes_per_second) == ("m4-max", 546_000_000_000)
    assert (plain.gpu_flops_per_second, plain.price_usd) == (18_400_000_000_000, 3499)
    assert wider.bandwidth_bytes_per_second == 600_000_000_000
    assert wider.gpu_flops_per_second == 20_000_000_000_000
    assert (limited.limit_bytes, limited.limit_source) == (120 * GIB, "given in --hardware")
    # The 36 GB machine came with the smaller GPU; asked for with the larger, its price is unknown.
    assert (smaller.bandwidth_bytes_per_second, smaller.price_usd) == (546_000_000_000, None)
    (usual,) = parse_hardware("m4-max-36")
    assert (usual.bandwidth_bytes_per_second, usual.price_usd) == (410_000_000_000, 1999)
    (more,) = parse_hardware("m3-ultra-256:memory=512GiB")
    assert (more.memory_bytes, more.limit_bytes) == (512 * GIB, 498_216_210_000)


def test_every_price_has_a_date_and_a_source_and_what_is_withdrawn_says_since_when() -> None:
    sold = [(chip, machine) for chip in chips().values() for machine in chip.machines]
    for chip, machine in sold:
        assert machine.memory_gib in chip.memory_gib
        assert machine.gpu_cores in chip.gpu_cores
        assert len(chip.bandwidth_gb_per_second) == len(chip.gpu_cores)
        assert machine.price_usd is None or (machine.price_date and machine.source)
    largest = chips()["m3-ultra"].sold(512)
    assert largest is not None
    assert largest.withdrawn == "2026-03"
    assert chips()["m5-ultra"].sold(512) is not None
    assert "m4-ultra" not in chips()


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("2x h200-141", ["h200-141/1", "h200-141/2"]),
        ("2x RTX 5090", ["rtx-5090-32/1", "rtx-5090-32/2"]),
        ("dgx spark", ["dgx-spark-128"]),
        ("NVIDIA RTX PRO 6000 Blackwell + rtx4090", ["rtx-pro-6000-96", "rtx-4090-24"]),
        ("a100-80gb + H100 SXM + h100-pcie", ["a100-80", "h100-80", "h100-pcie-80"]),
    ],
)
def test_cards_of_nvidia_are_named_as_people_write_them(spec: str, names: list[str]) -> None:
    nodes = parse_hardware(spec)
    assert [node.name for node in nodes] == names
    assert {node.device for node in nodes} == {"cuda"}
    written = hardware_text(nodes)
    assert written is not None
    assert parse_hardware(written) == nodes


def test_every_card_leaves_room_for_the_driver_and_has_its_figures_and_source() -> None:
    for card in cards().values():
        assert card.source.startswith("https://")
        assert card.devices
        for size, term in zip(card.memory, card.specifications, strict=True):
            (node,) = parse_hardware(term)
            assert 0.9 < node.limit_bytes / node.memory_bytes < 1
            assert node.bandwidth_bytes_per_second == size.bandwidth_gb_per_second * 10**9
            found = card_of_device(card.devices[0], size.bytes)
            assert found == (card, size)


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("h200 x2", "2x h200"), ("m3 ultra 512GB x 2", "2x m3 ultra 512GB"),
        ("h200-141 (2)", "2x h200-141"), ("a100 x2", "2x a100-40"),
        ("h200, m4-max-128", "h200 + m4-max-128"),
        ("m3-ultra-512 and m4-max-128", "m3-ultra-512 + m4-max-128"),
        ("2x m3-ultra-512; m4-max-128 x3", "2x m3-ultra-512 + 3x m4-max-128"),
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_refused_with_the_form_that_works(
    spec: str, written: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hardware(spec)
    assert caught.value.hint in (f"--hardware '{written}'", f"--hardware {written}")
    assert parse_hardware(written)


def test_an_unknown_card_is_refused_with_those_that_are_known_and_a_form_that_works() -> None:
    with pytest.raises(UsageError, match="unknown hardware 'mi300x'") as caught:
        parse_hardware("mi300x")
    assert "--hardware '2x m3-ultra-512'" in (caught.value.hint or "")
