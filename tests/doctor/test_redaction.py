"""A recording keeps the topology and nothing that identifies its owner."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from k2cli.cluster.facts.probes import ProbeOutput, RawProbes
from k2cli.cluster.links import detect_links
from k2cli.doctor.examination import Report, report_on, situation_of
from k2cli.doctor.recording import record, replay
from k2cli.doctor.redaction import Redactor

# Everything here must be gone from a recording, in whatever case it is written.
SECRETS = (
    "janes-studio", "office-mac", "jane", "Jane's", "studio-link", "C02XK1YZJG5J", "Z16T0004TJ",
    "D26E7BC6-425E-51C2-87C5-0B902782B60D", "7F158861-C131-4D0D-83B6-CA50EF76C32B",
    "88F10ACA-5CAA-4F5D-8361-03EED54ACB5A", "00008112-000251423E78201E", "0x05AC897E0A474D02",
    "8c:85:90:90:6d:26", "82:f1:30:25:50:01", "f8:4d:89:01:02:03",
    "192.168.3.227", "192.168.3.228", "203.0.113.77", "169.254.212.44", "2001:db8:77::15",
    "fe80::1c05:bcd3:6225:319", "Tax Returns", "SecretEditor", "private-model", "example.org",
    "05ac897e0a474d02", "Privatprojekt",
)  # fmt: skip


def _profile(own: str, peer: str) -> str:
    return json.dumps(
        {
            "SPHardwareDataType": [
                {
                    "_name": "hardware_overview",
                    "chip_type": "Apple M4 Max",
                    "machine_model": "Mac16,9",
                    "model_number": "Z16T0004TJ/A",
                    "platform_UUID": "D26E7BC6-425E-51C2-87C5-0B902782B60D",
                    "provisioning_UDID": "00008112-000251423E78201E",
                    "serial_number": "C02XK1YZJG5J",
                }
            ],
            "SPDisplaysDataType": [
                {
                    "_name": "Apple M4 Max",
                    "sppci_cores": "40",
                    "spdisplays_ndrvs": [{"_name": "Jane's display", "serial": "C02XK1YZJG5J"}],
                }
            ],
            "SPThunderboltDataType": [
                {
                    "_items": [
                        {
                            "_name": "Jane's office-mac",
                            "device_name_key": "Mac16,9",
                            "domain_uuid_key": peer,
                        }
                    ],
                    "_name": "thunderboltusb4_bus_0",
                    "device_name_key": "Mac Studio",
                    "domain_uuid_key": own,
                    "switch_uid_key": "0x05AC897E0A474D02",
                    "receptacle_1_tag": {
                        "current_speed_key": "80 Gb/s",
                        "receptacle_id_key": "1",
                    },
                }
            ],
        }
    )


def _ifconfig(thunderbolt: str, wifi: str) -> str:
    return f"""en5: flags=8863<UP,BROADCAST,RUNNING> mtu 1500
\tether 82:f1:30:25:50:01
\tinet6 fe80::1c05:bcd3:6225:319%en5 prefixlen 64 secured scopeid 0x4
\tinet {thunderbolt} netmask 0xffff0000 broadcast 169.254.255.255
\tstatus: active
en0: flags=8863<UP,BROADCAST,RUNNING> mtu 1500
\tether 8c:85:90:90:6d:26
\tinet {wifi} netmask 0xffffff00 broadcast 192.168.3.255
\tinet6 2001:db8:77::15 prefixlen 64 autoconf
\tstatus: active
"""


_PORTS = """
Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 8c:85:90:90:6d:26

Hardware Port: Thunderbolt 1
Device: en5
Ethernet Address: 82:f1:30:25:50:01

Hardware Port: Jane's phone
Device: en9
Ethernet Address: f8:4d:89:01:02:03
"""
_K2 = {
    "k2_version": "0.1.0",
    "python": "/Users/jane/Privatprojekt/bin/python",
    "python_version": "3.12.1",
    "mlx_version": "0.32.4",
    "mlx_lm_version": "0.32.2",
    "mlx_error": None,
    "memory_bytes": 2**37,
    "limit_bytes": None,
    "limit_mark": "assumed",
    "limit_source": "",
    "backend": None,
    "backends": [],
    "available_bytes": 2**36,
    "mpirun": None,
    "mpi_version": None,
    "libmpi": None,
    "volume": {
        "path": "/Volumes/Tax Returns/models",
        "mount_point": "/Volumes/Tax Returns",
        "filesystem": "apfs",
        "free_bytes": 10**12,
        "total_bytes": 10**12,
    },
    "time": 1795000000.0,
    "processes": [
        {"pid": 1, "name": "SecretEditor", "resident_bytes": 1, "run_id": None},
        {"pid": 2, "name": "python3.12", "resident_bytes": 1, "run_id": "private-model-3f9a"},
    ],
    "interfaces": {"studio-link": ["192.168.3.227"]},
}


def _node(name: str, hostname: str, own: str, peer: str, addresses: tuple[str, str]) -> RawProbes:
    texts = {
        "hostname": f"{hostname}.local\n",
        "sysctl": "hw.memsize: 137438953472\nmachdep.cpu.brand_string: Apple M4 Max\n",
        "system_profiler": _profile(own, peer),
        "networksetup": _PORTS,
        "ifconfig": _ifconfig(*addresses),
        "ibv_devices": "    device   node GUID\n    ------ ----\n    rdma_en5  05ac897e0a474d02\n",
        "pmset": " sleep                1 (sleep prevented by SecretEditor, powerd)\n",
        "k2": json.dumps(_K2),
    }
    outputs = {probe: ProbeOutput(0, text) for probe, text in texts.items()}
    outputs["rdma_ctl"] = ProbeOutput(1, "", f"jane@{hostname}: no rdma_ctl in /Users/jane/bin")
    return RawProbes(name, "Darwin", outputs)


def _report() -> Report:
    one, two = "7F158861-C131-4D0D-83B6-CA50EF76C32B", "88F10ACA-5CAA-4F5D-8361-03EED54ACB5A"
    probes = [
        _node("janes-studio", "janes-studio", one, two, ("169.254.212.44", "192.168.3.227")),
        _node("office", "office-mac", two, one, ("169.254.7.1", "192.168.3.228")),
        RawProbes(
            "gate.example.org",
            None,
            failure="node gate.example.org cannot be reached: connect to host 203.0.113.77 failed",
            hint="ssh gate.example.org true",
        ),
    ]
    situation = situation_of(probes, {})
    return report_on(situation, detect_links(situation.machines), probes, quick=False)


def _everything(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*")) if path.is_file())


def test_no_name_serial_or_address_remains(tmp_path: Path) -> None:
    record(_report(), tmp_path / "out")
    written = _everything(tmp_path / "out").lower()
    names = " ".join(path.name for path in (tmp_path / "out").rglob("*")).lower()
    for secret in SECRETS:
        assert secret.lower() not in written, secret
        assert secret.lower() not in names, secret


def test_whatever_looks_like_an_identifier_is_a_pseudonym(tmp_path: Path) -> None:
    """The test has its own patterns, so that it does not repeat the redactor's mistakes."""
    record(_report(), tmp_path / "out")
    written = _everything(tmp_path / "out")
    macs = set(re.findall(r"(?:[0-9a-fA-F]{1,2}:){5}[0-9a-fA-F]{1,2}", written))
    assert macs
    assert all(mac.startswith("02:00:00:00:") for mac in macs)
    uuids = set(re.findall(r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-\S{4}-\S{4}-[0-9A-Fa-f]{12}", written))
    assert len(uuids) == 2
    assert all(each.startswith("00000000-0000-4000-") for each in uuids)
    fours = [ipaddress.ip_address(a) for a in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", written)]
    private = ipaddress.ip_network("10.0.0.0/8")
    assert fours
    assert all(four in private or four.is_link_local for four in fours)
    assert set(re.findall(r"/Users/([^/\"]+)", written)) == {"user-1"}


def test_the_topology_survives(tmp_path: Path) -> None:
    before = _report()
    record(before, tmp_path / "out")
    after = replay(tmp_path / "out")
    names = {"janes-studio": "node-1", "office": "node-2", "gate.example.org": "node-3"}
    assert [(names[x.first], names[x.second], x.kind, x.rdma) for x in before.links] == [
        (x.first, x.second, x.kind, x.rdma) for x in after.links
    ]
    assert {link.kind for link in after.links} == {"thunderbolt", "wifi"}
    assert [(r.status, r.name, names.get(r.node or "")) for r in before.results] == [
        (r.status, r.name, r.node) for r in after.results
    ]


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(16, 32))
def test_addresses_of_one_network_stay_together(one: int, two: int, prefix: int) -> None:
    redactor = Redactor(b"key")
    pair = [ipaddress.IPv4Address((192 << 24 | 168 << 16) | host) for host in (one, two)]
    changed = [ipaddress.ip_address(redactor.text(str(each))) for each in pair]

    def together(addresses: list[ipaddress.IPv4Address]) -> bool:
        return len({ipaddress.ip_network(f"{a}/{prefix}", strict=False) for a in addresses}) == 1

    assert together(pair) == together([ipaddress.IPv4Address(str(each)) for each in changed])


def test_harmless_text_stays_as_it_is() -> None:
    redactor = Redactor(b"key")
    redactor.know_name("node", "ultra")
    for text in (
        "127.0.0.1",
        "0xffffff00",
        "::1",
        "26.5.1",
        "11:22:33",
        "rdma_en5",
        "1795000000.5",
    ):
        assert redactor.text(text) == text
    assert redactor.probe("sysctl", "brand: Apple M3 Ultra") == "brand: Apple M3 Ultra"
