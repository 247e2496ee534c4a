"""Parsers of the output of macOS's commands: published output, and the values in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2cli.cluster.facts import parse_macos
from k2cli.cluster.facts.machine import thunderbolt_links
from k2cli.cluster.facts.probes import ProbeOutput, RawProbes
from k2cli.cluster.facts.reading import machine_facts
from k2cli.doctor.recording import replay
from k2cli.errors import ClusterError

DATA = Path(__file__).resolve().parents[2] / "doctor" / "data"


def test_the_published_pair() -> None:
    machines = replay(DATA / "m5-max-pair-as-published").situation.machines
    first, second = machines["node-1"], machines["node-2"]
    assert (first.chip, first.model, first.os_version) == ("Apple M5 Max", "Mac17,6", "27.0")
    assert first.memory_bytes == 128 * 2**30
    assert (first.limit_bytes, first.limit_mark) == (115_448_730_000, "assumed")
    assert first.bandwidth_bytes_per_second == 614 * 10**9
    assert [port.interface for port in first.thunderbolt_ports] == ["en1", "en6", "en2"]
    assert [port.speed for port in first.thunderbolt_ports] == [
        "Up to 120 Gb/s",
        "80 Gb/s",
        "80 Gb/s",
    ]
    assert first.rdma_devices == ()
    assert second.rdma_devices == ("rdma_en1", "rdma_en6", "rdma_en2")
    assert set(second.rdma_states.values()) == {"PORT_DOWN"}
    assert thunderbolt_links(machines) == [("node-1", "en6", "node-2", "en6")]


def test_interfaces_of_the_healthy_pair() -> None:
    mac = replay(DATA / "healthy-pair").situation.machines["node-1"]
    assert mac.interface_kinds == {
        "lo0": "loopback",
        "en6": "thunderbolt",
        "en0": "wifi",
        "awdl0": "other",
    }
    assert mac.bridges == {"bridge0": ("en1", "en2")}
    [address] = mac.interfaces["en6"]
    assert mac.prefix_lengths[address] == 30
    [address] = mac.interfaces["en0"]
    assert mac.prefix_lengths[address] == 22


# From a public test of another program, 27 September 2026, whose docstring says: "Real outputs
# from the M3 Ultra / M4 Max rig, trimmed"; the index that it was found in does not name its
# repository. A Mac Studio with one MacBook Pro behind a cable and, again, behind a dock.
STUDIO = {
    "SPThunderboltDataType": [
        {
            "_items": [{"_name": "MacBook Pro", "device_name_key": "Mac16,5"}],
            "_name": "thunderboltusb4_bus_5",
            "device_name_key": "Mac Studio",
            "receptacle_1_tag": {"current_speed_key": "80 Gb/s", "receptacle_id_key": "6"},
        },
        {
            "_items": [
                {
                    "_items": [{"_name": "MacBook Pro", "device_name_key": "Mac16,5"}],
                    "_name": "ThunderBay Flex 8",
                    "device_name_key": "ThunderBay Flex 8",
                }
            ],
            "_name": "thunderboltusb4_bus_2",
            "device_name_key": "Mac Studio",
            "receptacle_1_tag": {"current_speed_key": "40 Gb/s", "receptacle_id_key": "3"},
        },
        {
            "_name": "thunderboltusb4_bus_0",
            "device_name_key": "Mac Studio",
            "receptacle_1_tag": {"current_speed_key": "Up to 120 Gb/s", "receptacle_id_key": "1"},
        },
    ]
}
STUDIO_PORTS = "".join(
    f"\nHardware Port: {port}\nDevice: {device}\n"
    for port, device in [
        ("Ethernet", "en0"),
        ("Ethernet Adapter (en8)", "en8"),
        ("Wi-Fi", "en1"),
        *((f"Thunderbolt {number}", f"en{number + 1}") for number in range(1, 7)),
    ]
)


def test_a_mac_behind_a_dock_is_seen_there() -> None:
    ports = parse_macos.hardware_ports(STUDIO_PORTS)
    assert ports["en2"] == "Thunderbolt 1"
    found = parse_macos.thunderbolt_ports(STUDIO, ports)
    assert [(p.receptacle, p.interface, p.peer_name, p.through_device) for p in found] == [
        ("1", "en2", None, None),
        ("3", "en4", "Mac16,5", "ThunderBay Flex 8"),
        ("6", "en7", "Mac16,5", None),
    ]


def test_memory_that_can_be_had() -> None:
    """A sample of a 24 GiB Mac, from a public test; 32,768 bytes apart per two pages."""
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                    17490.
Pages active:                                 468148.
Pages inactive:                               468488.
Pages speculative:                              4916.
Pages wired down:                             251554.
Pages purgeable:                                6528.
"""
    assert parse_macos.available_memory(text) == (17490 + 468488 + 4916) * 16384
    assert parse_macos.available_memory("Pages free: 3.") is None


@pytest.mark.parametrize(
    ("text", "minutes", "prevented"),
    [
        (" sleep                1 (sleep prevented by powerd, sharingd)", 1, "powerd, sharingd"),
        (" disksleep            10\n sleep                0\n displaysleep 10", 0, None),
        ("System-wide power settings:\n SleepDisabled\t\t1\nCurrently in use:\n sleep 1", 0, None),
        (" displaysleep         10\n Sleep On Power Button 1", None, None),
    ],
)
def test_sleep(text: str, minutes: int | None, prevented: str | None) -> None:
    assert parse_macos.sleep_setting(text) == (minutes, prevented)


@pytest.mark.parametrize(
    ("state", "block_all", "expected"),
    [
        ("Firewall is enabled. (State = 1)\n", None, "on"),
        ("Firewall is disabled. (State = 0)\n", None, "off"),
        ("Firewall is enabled. (State = 2)\n", None, "block-all"),
        ("Firewall is enabled. (State = 1)", "Firewall has block all state set to enabled.", None),
        (None, None, None),
    ],
)
def test_firewall(state: str | None, block_all: str | None, expected: str | None) -> None:
    wanted = "block-all" if block_all else expected
    assert parse_macos.firewall(state, block_all) == wanted


def _raw(**texts: str) -> RawProbes:
    outputs = {name: ProbeOutput(0, text) for name, text in texts.items()}
    return RawProbes("studio", "Darwin", outputs)


def test_a_raised_limit_is_known_exactly() -> None:
    facts = machine_facts(_raw(sysctl="hw.memsize: 549755813888\niogpu.wired_limit_mb: 480000\n"))
    assert (facts.limit_bytes, facts.limit_mark) == (480_000 * 2**20, "exact")


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"sysctl": "sysctl: unknown oid"},
        {"sysctl": "hw.memsize: 549755813888", "system_profiler": "{ not JSON"},
        {"sysctl": "hw.memsize: 549755813888", "system_profiler": '{"SPHardwareDataType": 3'},
    ],
)
def test_what_must_be_known_is_an_error_that_names_the_node(texts: dict[str, str]) -> None:
    with pytest.raises(ClusterError, match="node studio"):
        machine_facts(_raw(**texts))


@pytest.mark.parametrize(
    "profile",
    [
        {"SPThunderboltDataType": [{"receptacle_1_tag": "?"}], "SPHardwareDataType": ["?"]},
        {"SPThunderboltDataType": [{"receptacle_1_tag": {}, "_items": ["?"]}]},
        {"SPDisplaysDataType": []},
        [],
    ],
)
def test_an_unknown_form_of_the_profile_gives_no_ports(profile: object) -> None:
    raw = _raw(sysctl="hw.memsize: 549755813888", system_profiler=json.dumps(profile))
    assert machine_facts(raw).thunderbolt_ports == ()


def test_a_name_that_sysctl_does_not_know_hides_no_other() -> None:
    """Without ``-i`` it fails if one of several names is unknown (aws/amazon-ssm-agent#464)."""
    text = "hw.memsize: 549755813888\nhw.model: Mac15,14\n"
    failed = ProbeOutput(1, text, "sysctl: unknown oid 'iogpu.wired_limit_mb'\n")
    raw = RawProbes("studio", "Darwin", {"sysctl": failed})
    facts = machine_facts(raw)
    assert (facts.memory_bytes, facts.model) == (549_755_813_888, "Mac15,14")
    assert parse_macos.condition(raw).wired_limit_mib is None


@pytest.mark.parametrize(
    ("port", "kind"),
    [
        ("Thunderbolt 1", "thunderbolt"),
        ("Thunderbolt Bridge", "thunderbolt"),
        # Names of adapters in public configurations of Macs.
        ("Thunderbolt Ethernet Slot 1", "ethernet"),
        ("Thunderbolt Ethernet", "ethernet"),
        ("USB 10/100/1000 LAN", "ethernet"),
    ],
)
def test_a_network_adapter_at_a_thunderbolt_port_is_ethernet(port: str, kind: str) -> None:
    ports = f"\nHardware Port: {port}\nDevice: en8\nEthernet Address: 00:00:00:00:00:00\n"
    flags = "flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500"
    interface = f"en8: {flags}\n\tinet 10.0.0.2 netmask 0xffffff00 broadcast 10.0.0.255\n"
    raw = _raw(sysctl="hw.memsize: 549755813888", networksetup=ports, ifconfig=interface)
    assert machine_facts(raw).interface_kinds == {"en8": kind}
