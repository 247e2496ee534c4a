"""The link that joins the hosts: up, down, slow or lossy.

A plain link is a pair of virtual Ethernet devices per host, on a bridge of the console. Latency,
rate, loss and silence are made by the relay: the routes between the hosts are switched to it and
back while connections are open. Both ends keep their addresses.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.namespaces import enter_command, processes, run_ip

if TYPE_CHECKING:
    from lab.laboratory import Lab

DEVICE = "link0"
_RELAY_DEVICE = "relay0"
_RELAY = Path(__file__).with_name("relay.py")
_SECONDS = 10.0


def join_hosts(lab: Lab) -> None:
    """Connect every host to a bridge on the console, one per network."""
    console = lab.console
    begin = ["link set lo up"]
    for network in lab.networks:
        begin += [
            f"link add {network} type bridge",
            f"address add {console.addresses[network]}/24 dev {network}",
            f"link set {network} up",
        ]
        for host in lab.hosts:
            port = f"{host.name}-{network}"
            begin += [
                f"link add {port} mtu 9000 type veth peer name {network} mtu 9000"
                f" netns {host.state.pid}",
                f"link set {port} master {network} up",
            ]
    run_ip(console.state, begin)
    for host in lab.hosts:
        commands = ["link set lo up"]
        for network, address in host.addresses.items():
            commands += [f"address add {address}/24 dev {network}", f"link set {network} up"]
        run_ip(host.state, commands)


class Link:
    """The link of a lab."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    @property
    def _pipe(self) -> Path:
        return self._lab.folder / "relay.pipe"

    @property
    def relayed(self) -> bool:
        """True if the relay carries the packets."""
        return any(str(_RELAY) in found.command for found in processes(self._lab.console.state))

    def set(
        self,
        *,
        latency_ms: float = 0.0,
        rate_mbit: float = 0.0,
        loss: float = 0.0,
        silent: bool = False,
    ) -> None:
        """Set the condition of the link between any two hosts.

        Args:
            latency_ms: latency of one direction, in milliseconds.
            rate_mbit: rate of each direction, in 10^6 bit/s; 0 for no limit.
            loss: share of packets that are lost, 0 to 1.
            silent: drop all packets without an error.

        Raises:
            LabError: if the relay does not start.
        """
        if not (latency_ms or rate_mbit or loss or silent):
            self._stop_relay()
            return
        if not self.relayed:
            self._start_relay()
        order = {"latency_ms": latency_ms, "rate_mbit": rate_mbit, "loss": loss, "silent": silent}
        self._order(order)
        self._route()

    def down(self, host: str | None = None) -> None:
        """Disconnect the link at one host, or at all hosts."""
        self._switch("down", host)

    def up(self, host: str | None = None) -> None:
        """Connect the link again."""
        self._switch("up", host)
        if self.relayed:
            self._route()

    def _switch(self, state: str, host: str | None) -> None:
        for found in self._lab.hosts:
            if host in (None, found.name):
                devices = [DEVICE, *([_RELAY_DEVICE] if self.relayed else [])]
                run_ip(found.state, [f"link set {device} {state}" for device in devices])

    # --- the relay ------------------------------------------------------------------------------

    def _order(self, order: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, json.dumps(order).encode() + b"\n")
            finally:
                os.close(descriptor)
            return
        raise LabError("the relay of the link does not read its pipe")

    def _start_relay(self) -> None:
        self._pipe.unlink(missing_ok=True)
        os.mkfifo(self._pipe, 0o600)
        hosts = self._lab.hosts
        namespaces = [
            os.open(f"/proc/{host.state.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC) for host in hosts
        ]
        ready, ready_write = os.pipe()
        try:
            parts = [
                f"{host.address}={number}" for host, number in zip(hosts, namespaces, strict=True)
            ]
            command = [sys.executable, "-I", str(_RELAY), str(self._pipe), _RELAY_DEVICE]
            self._spawn([*command, str(ready_write), *parts], [ready_write, *namespaces])
            os.close(ready_write)
            readable, _, _ = select.select([ready], [], [], _SECONDS)
            if not readable or os.read(ready, 64) != b"ready\n":
                said = (self._lab.folder / "relay.log").read_text(errors="replace")
                raise LabError(f"the relay of the link did not start: {said.strip()[-300:]}")
        finally:
            os.close(ready)
            for number in namespaces:
                os.close(number)
        for host in hosts:
            run_ip(host.state, [f"link set {_RELAY_DEVICE} mtu 9000 up"])

    def _spawn(self, arguments: list[str], descriptors: list[int]) -> None:
        """Start the relay in the console's PID namespace, so that it ends with the lab."""
        command = enter_command(self._lab.console.state, arguments, {}, "/")
        with (self._lab.folder / "relay.log").open("wb") as log:
            subprocess.run(
                ["setsid", "--fork", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                timeout=_SECONDS,
                check=True,
            )

    def _route(self) -> None:
        for host in self._lab.hosts:
            others = [other.address for other in self._lab.hosts if other.name != host.name]
            run_ip(
                host.state,
                [
                    f"route replace {other}/32 dev {_RELAY_DEVICE} src {host.address}"
                    for other in others
                ],
            )

    def _stop_relay(self) -> None:
        if not self.relayed:
            return
        self._order({"stop": True})
        until = time.monotonic() + _SECONDS
        while self.relayed:
            if time.monotonic() > until:
                raise LabError("the relay of the link does not end")
            time.sleep(0.01)
