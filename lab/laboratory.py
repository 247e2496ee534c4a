"""The lab: it starts hosts, runs commands on them, and removes everything afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import home
from lab.errors import LabError
from lab.link import DEVICE, Link, join_hosts
from lab.namespaces import (
    LabProcess,
    end_host,
    enter_command,
    processes,
    start_host,
)
from lab.requirements import missing_requirements
from lab.restore import record_host, restore_host
from lab.sshd import end_sshd, start_sshd
from lab.state import HostState, LabState, is_alive, lab_folder, locked, read_state, save_state

CONSOLE = "console"
ETHERNET = "eth0"
_SECONDS = 20.0
_MAXIMUM_HOSTS = 20


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the lab: its SSH name and host name, and its address on each network."""

    name: str
    addresses: Mapping[str, str]
    folder: Path
    state: HostState

    @property
    def address(self) -> str:
        """Address on the link."""
        return self.addresses[DEVICE]

    @property
    def home(self) -> Path:
        """Its home folder, as seen from outside."""
        return self.folder / "home"


def _addresses(index: int, networks: Sequence[str]) -> dict[str, str]:
    """Return the addresses of host ``index`` (0 the first, -1 the console) by network."""
    number = 254 if index < 0 else index + 1
    return {network: f"10.88.{subnet}.{number}" for subnet, network in enumerate(networks)}


def host_names(count: int) -> list[str]:
    """Return the names of the first ``count`` hosts: ``k2a``, ``k2b``, and so on."""
    return [f"k2{chr(ord('a') + index)}" for index in range(count)]


class Lab:
    """A lab that is up. Made by ``Lab.up`` and ``Lab.attach``."""

    def __init__(self, folder: Path, state: LabState) -> None:
        self.folder = folder
        self.name = state.name
        self._state = state
        self.networks = tuple(state.networks)
        self.console = self._host(state.console, -1)
        self.hosts = tuple(self._host(host, index) for index, host in enumerate(state.hosts))
        self.link = Link(self)
        self._parents: list[subprocess.Popen[bytes]] = []
        self._background: list[subprocess.Popen[bytes]] = []
        self._owner: int | None = None

    def _host(self, state: HostState, index: int) -> Host:
        addresses = _addresses(index, self.networks)
        return Host(state.name, addresses, self.folder / state.name, state)

    # --- up and down ----------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        name: str = "default",
        hosts: int = 2,
        *,
        ethernet: bool = False,
        share: Sequence[Path] = (),
        tied: bool = False,
    ) -> Lab:
        """Start a lab, or attach to the lab of that name if it is up with the same options.

        Args:
            name: name of the lab; several labs can be up at the same time.
            hosts: number of hosts beside the console.
            ethernet: add a second network, ``eth0``; the host names then resolve to it.
            share: folders below /tmp, /run, /var/tmp, ... that hosts must see, although each host
                has its own /tmp and so on.
            tied: end the lab with this process, for whatever reason it ends.

        Raises:
            LabError: if the machine lacks something, or a host does not start.
        """
        if missing := missing_requirements():
            raise LabError(*missing[0])
        if not 1 <= hosts <= _MAXIMUM_HOSTS:
            raise LabError(f"{hosts} hosts are not between 1 and {_MAXIMUM_HOSTS}")
        folder = lab_folder(name)
        networks = [DEVICE, ETHERNET] if ethernet else [DEVICE]
        with locked():
            state = read_state(folder)
            if state is not None and _is_like(state, networks, hosts):
                lab = cls(folder, state)
                lab.start_sshd()
                return lab
            _clear(folder)
            return _build(cls, folder, name, networks, hosts, list(share), tied)

    @classmethod
    def attach(cls, name: str = "default") -> Lab:
        """Return the lab of that name.

        Raises:
            LabError: if it is not up.
        """
        folder = lab_folder(name)
        state = read_state(folder)
        if state is None or not all(is_alive(host) for host in [state.console, *state.hosts]):
            raise LabError(f"lab '{name}' is not up", f"scripts/lab up --name {name}")
        return cls(folder, state)

    def down(self) -> None:
        """End every process of the lab and remove its folder."""
        with locked():
            _end([*self._state.hosts, self._state.console])
            _clear(self.folder)
        for process in self._background:
            process.wait(_SECONDS)
        for parent in self._parents:
            parent.wait(_SECONDS)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    # --- hosts ----------------------------------------------------------------------------------

    def host(self, which: int | str) -> Host:
        """Return a host by number or name; ``console`` is a machine without a rank.

        Raises:
            LabError: if there is no such host.
        """
        if which == CONSOLE:
            return self.console
        for index, host in enumerate(self.hosts):
            if which in (index, host.name):
                return host
        names = ", ".join([host.name for host in self.hosts] + [CONSOLE])
        raise LabError(f"lab '{self.name}' has no host '{which}'", f"one of {names}")

    def command(
        self,
        host: int | str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: str = home.HOME,
    ) -> list[str]:
        """Return the command line that runs ``arguments`` on a host."""
        whole = {**home.environment(), **(environment or {})}
        return enter_command(self.host(host).state, arguments, whole, folder)

    def exec(
        self,
        host: int | str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        input: str | None = None,
        timeout_seconds: float = 60.0,
        folder: str = home.HOME,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; the caller checks output and status."""
        return subprocess.run(
            self.command(host, arguments, environment, folder),
            input=input if input is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            start_new_session=True,
        )

    def start(
        self,
        host: int | str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        output: int | None = subprocess.PIPE,
        folder: str = home.HOME,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host in its own session; stderr goes to stdout."""
        return subprocess.Popen(
            self.command(host, arguments, environment, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def start_background(self, host: int | str, arguments: Sequence[str]) -> None:
        """Start a command whose output is discarded; ``mend`` ends it."""
        self._background.append(self.start(host, arguments, output=subprocess.DEVNULL))

    def processes(self, host: int | str) -> list[LabProcess]:
        """Return the processes on a host without the host's own services."""
        return [found for found in processes(self.host(host).state) if not found.is_service]

    def all_processes(self, host: int | str) -> list[LabProcess]:
        """Return all processes on a host, its services included."""
        return processes(self.host(host).state)

    def process_count(self, host: int | str) -> int:
        """Return the exact number of processes on a host without its own services."""
        return len(self.processes(host))

    # --- the link -------------------------------------------------------------------------------

    def link_down(self, host: str | None = None) -> None:
        """Disconnect the link at one host, or at all hosts."""
        self.link.down(host)

    def link_up(self, host: str | None = None) -> None:
        """Connect the link again at one host, or at all hosts."""
        self.link.up(host)

    # --- sshd -----------------------------------------------------------------------------------

    def start_sshd(self, host: int | str | None = None) -> None:
        """Start sshd on hosts on which it does not run, and wait until it listens.

        Raises:
            LabError: if sshd does not start.
        """
        for found in self.hosts if host is None else [self.host(host)]:
            start_sshd(found.state, found.folder)

    def end_processes(self) -> None:
        """Send SIGKILL to all processes of hosts and console except the lab's services."""
        for host in [*self.hosts, self.console]:
            for found in self.processes(host.name):
                _kill(found)

    def mend(self) -> None:
        """Restore a good link and every sshd, and end all other processes."""
        self.link.set()
        self.link.up()
        self.end_processes()
        for process in self._background:
            process.wait(_SECONDS)
        self._background.clear()
        self.start_sshd()

    def renew(self) -> None:
        """Mend, and make the hosts as they were built: mounts, homes, keys, files in memory.

        Raises:
            LabError: if a process does not end, a mount stays, or sshd does not start.
        """
        self.mend()
        self._end_all()
        for host in [*self.hosts, self.console]:
            if restore_host(host.state, host.folder):
                end_sshd(host.state)
        self.start_sshd()

    def _end_all(self) -> None:
        """End all processes but init and sshd, those that they start meanwhile and shared ssh too.

        Raises:
            LabError: if one does not end.
        """
        until = time.monotonic() + _SECONDS
        while left := [
            found
            for host in [*self.hosts, self.console]
            for found in self.all_processes(host.name)
            if not found.is_service or found.is_shared_ssh
        ]:
            if time.monotonic() > until:
                raise LabError(f"process {left[0].pid} does not end: {left[0].command[:100]}")
            for found in left:
                _kill(found)
            time.sleep(0.01)


def _kill(process: LabProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _is_like(state: LabState, networks: list[str], hosts: int) -> bool:
    alive = all(is_alive(host) for host in [state.console, *state.hosts])
    return alive and state.networks == networks and len(state.hosts) == hosts


def _end(hosts: Sequence[HostState]) -> None:
    for host in hosts:
        end_host(host)


def _clear(folder: Path) -> None:
    state = read_state(folder)
    if state is not None:
        _end([*state.hosts, state.console])
    shutil.rmtree(folder, ignore_errors=True)


# --- building -----------------------------------------------------------------------------------


def _build(
    kind: type[Lab],
    folder: Path,
    name: str,
    networks: list[str],
    count: int,
    share: list[Path],
    tied: bool,
) -> Lab:
    names = host_names(count)
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    _write_all_files(folder, names, networks)
    owner_read, owner = os.pipe() if tied else (None, None)
    started: list[HostState] = []
    parents: list[subprocess.Popen[bytes]] = []
    try:
        for host in [CONSOLE, *names]:
            orders = home.mount_orders(folder / host, share)
            state, parent = start_host(host, orders, folder / host, owner_read)
            started.append(state)
            parents.append(parent)
            # Saved after each host, so that the state is complete if this process is killed.
            save_state(folder, LabState(name, networks, started[0], started[1:]))
            record_host(state, folder / host)
    except BaseException:
        _clear(folder)
        raise
    finally:
        if owner_read is not None:
            os.close(owner_read)
    lab = kind(folder, LabState(name, networks, started[0], started[1:]))
    lab._parents, lab._owner = parents, owner
    try:
        join_hosts(lab)
        lab.start_sshd()
    except BaseException:
        lab.down()
        raise
    return lab


def _write_all_files(folder: Path, names: list[str], networks: list[str]) -> None:
    user_key = folder / "user_key"
    home.make_key(user_key, "k2 lab")
    addresses = {name: _addresses(index, networks) for index, name in enumerate(names)}
    addresses[CONSOLE] = _addresses(-1, networks)
    keys = {}
    for name in names:
        (folder / name / "ssh").mkdir(parents=True)
        keys[name] = home.make_key(folder / name / "ssh" / "host_key", name)
    known = home.known_hosts(
        keys, {name: [name, f"{name}.{DEVICE}", *addresses[name].values()] for name in names}
    )
    # The first network is the link; names resolve to the last one, as a Mac's to its Ethernet.
    lines = ["127.0.0.1 localhost"]
    lines += [f"{found[networks[-1]]} {name}" for name, found in addresses.items()]
    lines += [f"{found[DEVICE]} {name}.{DEVICE}" for name, found in addresses.items()]
    hosts = "\n".join(lines) + "\n"
    for name in [*names, CONSOLE]:
        home.write_files(folder / name, name, user_key, known, hosts)
