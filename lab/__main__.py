"""The command line ``scripts/lab``, which controls a lab by hand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lab.errors import LabError
from lab.faults import CONDITIONS, mend_condition
from lab.laboratory import Lab
from lab.state import lab_folder, labs_directory, read_state


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _up(options: argparse.Namespace) -> int:
    lab = Lab.up(options.name, options.hosts, ethernet=options.ethernet)
    _describe(lab)
    _say(f"next: scripts/lab exec --name {lab.name} {lab.hosts[0].name} -- k2 --help")
    return 0


def _describe(lab: Lab) -> None:
    _say(f"lab {lab.name}: {len(lab.hosts)} host(s), {lab.folder}")
    for host in lab.hosts:
        where = ", ".join(f"{device} {address}" for device, address in host.addresses.items())
        _say(f"  {host.name}  {where}  {lab.process_count(host.name)} process(es)")


def _down(options: argparse.Namespace) -> int:
    folder = lab_folder(options.name)
    state = read_state(folder)
    if state is not None:
        Lab(folder, state).down()
        _say(f"lab {options.name} is down")
    else:
        _say(f"lab {options.name} was not up")
    return 0


def _exec(options: argparse.Namespace) -> int:
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not arguments:
        raise LabError("exec needs a command", f"scripts/lab exec {options.host} -- hostname")
    settings = {"TERM": os.environ.get("TERM", "dumb")} if sys.stdin.isatty() else {}
    command = Lab.attach(options.name).command(options.host, _of_k2(arguments), settings)
    os.execv(command[0], command)


def _of_k2(arguments: list[str]) -> list[str]:
    """Replace ``k2`` by the k2 of this checkout."""
    if arguments[0] == "k2":
        return [sys.executable, "-m", "k2cli", *arguments[1:]]
    return arguments


def _status(options: argparse.Namespace) -> int:
    directory = labs_directory()
    names = [options.name] if options.name else []
    if not names and directory.is_dir():
        names = sorted(path.name for path in directory.iterdir() if read_state(path) is not None)
    for name in names:
        try:
            lab = Lab.attach(name)
        except LabError as error:
            _say(error.message)
            continue
        _describe(lab)
        for host in lab.hosts:
            for process in lab.processes(host.name):
                _say(f"    {host.name} {process.inner_pid}: {process.command[:120]}")
    if not names:
        _say("no lab is up")
    return 0


def _link(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    if options.down:
        lab.link_down(options.host)
    elif options.up:
        lab.link_up(options.host)
    else:
        lab.link.set(
            latency_ms=options.latency_ms,
            rate_mbit=options.rate_mbit,
            loss=options.loss,
            silent=options.silent,
        )
    return 0


def _fault(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    fault = CONDITIONS[options.fault]
    if options.mend:
        mend_condition(lab, fault)
        _say(f"repaired: {fault.what}; all processes on the hosts were ended")
    else:
        fault.act(lab, None)
        _say(f"{fault.what}; scripts/lab fault {options.fault} --mend --name {lab.name} repairs it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/lab", description="Several hosts on one Linux.")
    parts = parser.add_subparsers(required=True)

    def part(
        name: str, help: str, run: object, default: str | None = "default"
    ) -> argparse.ArgumentParser:
        found = parts.add_parser(name, help=help)
        found.add_argument("--name", default=default, help="name of the lab")
        found.set_defaults(run=run)
        return found

    up = part("up", "start a lab; no effect if it is up", _up)
    up.add_argument("--hosts", type=int, default=2)
    up.add_argument("--ethernet", action="store_true", help="add a second network, eth0, for SSH")
    part("down", "stop a lab and remove its files", _down)
    execute = part("exec", "run a command on a host (k2a, k2b, ... or console)", _exec)
    execute.add_argument("host")
    execute.add_argument("arguments", nargs=argparse.REMAINDER)
    part("status", "list the labs that are up, and their processes", _status, None)
    fault = part("fault", "cause a fault that lasts until it is repaired", _fault)
    fault.add_argument("fault", choices=sorted(CONDITIONS))
    fault.add_argument("--mend", action="store_true", help="repair the fault")
    link = part("link", "set the condition of the link; without options, a good one", _link)
    link.add_argument("--latency-ms", type=float, default=0.0)
    link.add_argument("--rate-mbit", type=float, default=0.0)
    link.add_argument("--loss", type=float, default=0.0, help="0 to 1")
    link.add_argument("--silent", action="store_true", help="drop all packets without an error")
    link.add_argument("--down", action="store_true", help="disconnect the link")
    link.add_argument("--up", action="store_true", help="connect the link again")
    link.add_argument("--host", default=None, help="only at this host")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 1 with an error and a hint on stderr."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except LabError as error:
        sys.stderr.write(f"error: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
