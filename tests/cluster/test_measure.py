"""Measurements for real, between two nodes that are both this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2cli.agent import disk as disk_probe
from k2cli.choices import LinkTransport
from k2cli.cluster.description import Link
from k2cli.cluster.facts.machine import MachineFacts
from k2cli.cluster.facts.probes import collect
from k2cli.cluster.facts.reading import machine_facts
from k2cli.cluster.measure import measure_disks, measure_links, measure_reach
from k2cli.nodes.local import LocalNode


class Named(LocalNode):
    """This machine under another name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _pair() -> tuple[list[Named], dict[str, MachineFacts]]:
    nodes = [Named("one"), Named("two")]
    facts = machine_facts(collect(nodes[0], quick=True))
    return nodes, {node.name: facts for node in nodes}


def _loopback(address: str = "127.0.0.1") -> Link:
    return Link("one", "two", "ethernet", "lo", address, "lo", address)


def test_addresses_are_tried_both_ways() -> None:
    nodes, machines = _pair()
    reaches = measure_reach(nodes, machines, [_loopback()])
    answered = {(r.source, r.target): r for r in reaches if r.address == "127.0.0.1"}
    assert set(answered) == {("one", "two"), ("two", "one")}
    for reach in answered.values():
        assert reach.error is None
        assert reach.expected
        assert reach.seconds is not None
        assert reach.interface == ("lo" if os.uname().sysname == "Linux" else "lo0")


def test_an_address_without_a_machine_does_not_answer() -> None:
    nodes, machines = _pair()
    reaches = measure_reach(nodes, machines, [_loopback("127.0.0.1")])
    assert all(reach.error is None for reach in reaches if reach.address == "127.0.0.1")
    unknown = {"lo": ("127.0.0.1", "240.0.0.1")}
    far = {
        name: MachineFacts(
            **{
                field: getattr(facts, field)
                for field in MachineFacts.__dataclass_fields__
                if field != "interfaces"
            },
            interfaces=unknown,
        )
        for name, facts in machines.items()
    }
    reaches = measure_reach(nodes, far, [_loopback("240.0.0.1")])
    assert {(r.address, r.error is None) for r in reaches} == {("240.0.0.1", False)}


@pytest.mark.parametrize("transport", ["ring", "tcp"])
def test_a_link_is_measured_with_its_transport(transport: LinkTransport) -> None:
    nodes, _ = _pair()
    [measured] = measure_links({node.name: node for node in nodes}, [_loopback()], transport)
    assert measured.error is None
    assert measured.latency_seconds is not None
    assert measured.bytes_per_second is not None
    assert (measured.all_reduce_seconds is not None) == (transport != "tcp")


def test_a_back_end_that_mlx_lacks_is_told_apart_from_a_bad_link() -> None:
    """JACCL is not in mlx for Linux: the link itself works, and the finding says both."""
    nodes, _ = _pair()
    if "jaccl" in collect(nodes[0], quick=True).outputs["k2"].stdout:
        pytest.skip("this mlx has JACCL, and would want RDMA devices")
    [measured] = measure_links({node.name: node for node in nodes}, [_loopback()], "jaccl")
    assert measured.error is not None
    assert "plain TCP works" in measured.error


def test_disk_speed_is_read_from_the_largest_file(tmp_path: Path) -> None:
    (tmp_path / "small.safetensors").write_bytes(bytes(100))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.safetensors").write_bytes(os.urandom(3 * 2**20 + 5))
    [speed] = measure_disks([Named("one")], {"one": str(tmp_path)}).values()
    assert speed.error is None
    assert speed.path == str(tmp_path / "sub/model.safetensors")
    assert speed.read_bytes == 3 * 2**20 + 5
    assert speed.bytes_per_second is not None
    assert disk_probe.read_speed(str(tmp_path / "none")).error is not None
