"""Checks between machines: reachable addresses, firewalls, speed of links, and RDMA."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator

from k2cli.agent.software import Software
from k2cli.cluster.facts.machine import MachineFacts, ThunderboltPort, thunderbolt_links
from k2cli.cluster.facts.probes import FIREWALL_PROGRAM
from k2cli.cluster.measure import LinkMeasurement, Reach
from k2cli.doctor.checks_software import version_key
from k2cli.doctor.results import CheckResult, Situation, Status, on_node
from k2cli.nodes.node import LOCALHOST
from k2cli.planning.hardware.chips import chip_of_device
from k2cli.rdma_launches import SAFE_LAUNCHES, launches_text

RDMA_MACOS = (26, 2)
"""First macOS with RDMA over Thunderbolt (MLX's documentation of distributed communication)."""

THUNDERBOLT_5_GBPS = 80
"""Speed of a Thunderbolt 5 link. macOS also lists RDMA devices for Thunderbolt 4 ports, which do
not work (exo-explore/exo#1813)."""

NO_RDMA_PORTS = {"Mac15,14": "en2"}
"""Interface of the port without RDMA, beside Ethernet, by model (exo-explore/exo#1551)."""

SLOW_ALL_REDUCE_SECONDS = 0.002
"""A tensor-parallel token needs about two all-reduces per layer: 2 ms each are 0.25 s for K2."""

_PRIVACY = (
    "System Settings > Privacy & Security > Local Network: allow the program that k2 was started "
    "from (docs/guide/doctor.md)"
)


# --- reachability -------------------------------------------------------------------------------


def reach(situation: Situation) -> Iterable[CheckResult]:
    """Check that every node reaches the addresses of the others that are on its networks."""
    pairs = sorted({(each.source, each.target) for each in situation.reaches or ()})
    for source, target in pairs:
        tried = [r for r in situation.reaches or () if (r.source, r.target) == (source, target)]
        yield from _pair(situation, source, target, tried)


def _pair(
    situation: Situation, source: str, target: str, tried: list[Reach]
) -> Iterator[CheckResult]:
    name = f"{source} to {target}"
    worked = [each for each in tried if each.error is None]
    failed = [each for each in tried if each.error is not None and each.expected]
    if not worked:
        error = next((each.error for each in tried), "no address was tried")
        detail = f"none of {len(tried)} address(es) answers: {error}"
        yield CheckResult(
            "fail", "reach", name, detail, _reach_hint(situation, source, target, error)
        )
        return
    listed = ", ".join(
        f"{each.address} through {each.interface or '?'} {1000 * (each.seconds or 0):.1f} ms"
        for each in worked
    )
    yield CheckResult("pass", "reach", name, listed)
    for each in failed:
        detail = f"{each.address} ({each.target_interface}) does not answer: {each.error}"
        hint = _reach_hint(situation, source, target, each.error)
        yield CheckResult("warn", "reach", name, detail, hint)


def _reach_hint(situation: Situation, source: str, target: str, error: str | None) -> str:
    macs = situation.macs
    if source in macs and error is not None and "No route to host" in error:
        return _PRIVACY
    if target in macs:
        return on_node(target, f"{FIREWALL_PROGRAM} --listapps") + ", and allow python"
    return on_node(target, "sudo nft list ruleset") + ", and check the cable"


def firewall(situation: Situation) -> Iterable[CheckResult]:
    """Check that no firewall refuses incoming connections, which ranks need."""
    for node in situation.nodes:
        state = node.condition.firewall
        if state == "off":
            yield CheckResult("pass", "firewall", node.node, "off")
        elif state == "block-all":
            command = on_node(node.node, f"sudo {FIREWALL_PROGRAM} --setblockall off")
            detail = "blocks all incoming connections"
            yield CheckResult("fail", "firewall", node.node, detail, command)
        elif state == "on":
            command = _admitting(node.node, node.software)
            detail = "on: it refuses unsigned programs, so it may refuse the ranks' connections"
            yield CheckResult("warn", "firewall", node.node, detail, command)


def _admitting(node: str, software: Software | None) -> str:
    """Return the commands that let a node's Python in.

    The firewall judges the file that runs, and an environment has a link to it. Each option is a
    command of its own, as in nodejs/node's tools/macos-firewall.sh.
    """
    program = "PROGRAM"
    if software is not None:
        program = shlex.quote(software.program or software.python)
    options = (f"--add {program}", f"--unblockapp {program}")
    both = " && ".join(f"sudo {FIREWALL_PROGRAM} {option}" for option in options)
    return both if node == LOCALHOST else f"ssh -t {node} {shlex.quote(both)}"


# --- links --------------------------------------------------------------------------------------


def links(situation: Situation) -> Iterable[CheckResult]:
    """Check the measurements of links."""
    for each in situation.links or ():
        name = f"{each.first} - {each.second}"
        if each.error is not None:
            detail = f"{each.backend} over {each.kind}: {each.error}"
            yield CheckResult("fail", "link", name, detail, "first fix the failures of 'reach'")
            continue
        slow = (each.all_reduce_seconds or 0) > SLOW_ALL_REDUCE_SECONDS or each.kind == "wifi"
        hint = _slow_hint(each) if slow else None
        yield CheckResult("warn" if slow else "pass", "link", name, link_figures(each), hint)


def link_figures(link: LinkMeasurement) -> str:
    """Format figures as ``ring over ethernet: all-reduce 210 us, one way 95 us, 1.17 GB/s``."""
    parts = []
    if link.all_reduce_seconds is not None:
        parts.append(f"all-reduce {_micro(link.all_reduce_seconds)}")
    if link.latency_seconds is not None:
        parts.append(f"one way {_micro(link.latency_seconds)}")
    if link.bytes_per_second is not None:
        parts.append(f"{link.bytes_per_second / 1e9:.2f} GB/s")
    note = f" ({link.note})" if link.note else ""
    return f"{link.backend} over {link.kind}: {', '.join(parts)}{note}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def _slow_hint(link: LinkMeasurement) -> str:
    if link.kind == "wifi":
        return "join the machines with a cable: Thunderbolt, or else Ethernet"
    return "use pipeline and not tensor parallelism over this link: k2 launch --parallel pipeline"


# --- RDMA ---------------------------------------------------------------------------------------


def rdma(situation: Situation) -> Iterable[CheckResult]:
    """Check RDMA over Thunderbolt between connected Macs: system, setting, ports and bridges."""
    wanted = situation.transport == "jaccl"
    bad: Status = "fail" if wanted else "warn"
    macs = situation.macs
    joined = thunderbolt_links(macs)
    ends = {(name, i) for a, ai, b, bi in joined for name, i in ((a, ai), (b, bi))}
    for name, machine in macs.items():
        used = [port for port in machine.thunderbolt_ports if (name, port.interface) in ends]
        if used or wanted:
            yield from _rdma_of(situation, name, machine, used, bad)
    if wanted and len(macs) < len(situation.machines):
        others = ", ".join(name for name in situation.machines if name not in macs)
        yield CheckResult("fail", "RDMA", None, f"{others}: only Macs have it", "--backend ring")


def rdma_launches(situation: Situation) -> Iterable[CheckResult]:
    """Check how often RDMA was used since each machine was started."""
    if situation.transport not in ("auto", "jaccl"):
        return
    for node, each in situation.software.items():
        count = each.rdma_launches
        if count >= SAFE_LAUNCHES:
            detail = launches_text(count)
            hint = on_node(node, "sudo shutdown -r now")
            yield CheckResult("warn", "RDMA launches", node, detail, hint)
        elif count:
            detail = f"{count} since this machine was started"
            yield CheckResult("pass", "RDMA launches", node, detail)


def _rdma_of(
    situation: Situation, name: str, mac: MachineFacts, used: list[ThunderboltPort], bad: Status
) -> Iterator[CheckResult]:
    chip = chip_of_device(mac.chip)
    if chip is not None and not chip.thunderbolt_rdma:
        detail = f"{mac.chip} has no Thunderbolt 5, and without it there is no RDMA"
        yield CheckResult("skip" if bad == "warn" else bad, "RDMA", name, detail, "--backend ring")
        return
    if version_key(mac.os_version) < RDMA_MACOS:
        detail = f"macOS {mac.os_version} has none: it came with 26.2"
        hint = on_node(name, "sudo softwareupdate --install --all")
        yield CheckResult(bad, "RDMA", name, detail, hint)
        return
    condition = next(each.condition for each in situation.nodes if each.node == name)
    if condition.rdma_enabled is False or not mac.rdma_devices:
        detail = "RDMA is not enabled" if condition.rdma_enabled is False else "no RDMA devices"
        hint = f"start {name} into Recovery, open Terminal there: rdma_ctl enable; then restart"
        yield CheckResult(bad, "RDMA", name, detail, hint)
        return
    problems = [each for port in used for each in port_problems(mac, port)]
    number = 1 + list(situation.macs).index(name)
    for detail, hint in problems:
        yield CheckResult(bad, "RDMA", name, detail, hint.format(node=name, number=number))
    if used and not problems:
        ports = ", ".join(f"rdma_{port.interface} at {port.speed}" for port in used)
        yield CheckResult("pass", "RDMA", name, f"enabled, {ports}")
    elif not used:
        yield CheckResult(bad, "RDMA", name, "no Thunderbolt cable to another node", "plug one in")


def port_problems(mac: MachineFacts, port: ThunderboltPort) -> list[tuple[str, str]]:
    """List the problems of a port that is used for RDMA, each with the hint that fixes it.

    A hint has ``{node}`` for the name of the Mac, and ``{number}`` for one that no other Mac has.
    """
    found: list[tuple[str, str]] = []
    where = f"receptacle {port.receptacle} ({port.interface})"
    if NO_RDMA_PORTS.get(mac.model or "") == port.interface:
        found.append(
            (f"{where}, the port beside Ethernet, has no RDMA", "move the cable to another port")
        )
    speed = link_gbps(port.speed)
    if speed is not None and speed < THUNDERBOLT_5_GBPS:
        found.append((f"{where} runs at {speed} Gb/s, RDMA needs 80", "use a Thunderbolt 5 cable"))
    if port.through_device is not None:
        found.append((f"{where} goes through {port.through_device}", "join the Macs directly"))
    device = f"rdma_{port.interface}"
    if device not in mac.rdma_devices:
        found.append((f"there is no {device} for {where}", "restart {node}, then ibv_devices"))
    elif mac.rdma_states.get(device, "PORT_ACTIVE") != "PORT_ACTIVE":
        state = mac.rdma_states[device]
        found.append((f"{device} is {state}", "check the cable; ssh {node} ibv_devinfo"))
    bridge = next((name for name, each in mac.bridges.items() if port.interface in each), None)
    if bridge is not None:
        hint = f"ssh -t {{node}} sudo ifconfig {bridge} deletem {port.interface}"
        found.append((f"{where} is a member of {bridge}, which takes its traffic", hint))
    addresses = mac.interfaces.get(port.interface or "", ())
    if not found and mac.interfaces and all(":" in address for address in addresses):
        # mlx 0.32.4: "[jaccl] No IPv4-mapped GID for this device", with this remedy (mlx#4191).
        hint = (
            f"ssh -t {{node}} sudo ifconfig {port.interface} inet "
            f"169.254.{port.receptacle}.{{number}} netmask 255.255.0.0 alias  (until it restarts)"
        )
        found.append((f"{where} has no IPv4 address, which MLX needs for RDMA", hint))
    return found


def link_gbps(speed: str) -> int | None:
    """Parse ``80 Gb/s`` as 80; None for ``Up to 120 Gb/s``, the limit of a port without a link."""
    match = re.fullmatch(r"(\d{1,9}) Gb/s", speed.strip())
    return int(match.group(1)) if match else None
