"""What k2 asks of one node: its versions, the files and processes of a run, and ports.

On this machine these functions are called; on another they run as
``python -m k2cli.agent.main VERB ...`` over ssh and answer in JSON, so that both do the same.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from k2cli import __version__
from k2cli.agent.activity import activity
from k2cli.agent.facts import UNKNOWN_VERB_STATUS, facts
from k2cli.agent.ports import choose_port, free_ports, port_holder
from k2cli.agent.run_folder import remove_bootstraps, write_private
from k2cli.agent.run_processes import count_processes, kill_run, processes_of_run

# --- locks, which are in cluster.lock_files ------------------------------------------------


def _lock_take(share: str, input: bytes) -> Any:
    from k2cli.agent.locks import Claim, take

    return take(msgspec.json.decode(input, type=Claim), count_processes, share=share == "1")


def _lock_renew(run_id: str, pid: str, create_time: str) -> Any:
    from k2cli.agent.locks import renew

    return renew(run_id, int(pid), float(create_time))


def _locks() -> Any:
    from k2cli.agent.locks import list_locks

    return list_locks(count_processes)


def _lock_release(run_id: str) -> None:
    from k2cli.agent.locks import release

    release(run_id)


def _clean(live: str, gone: str) -> Any:
    from k2cli.agent.clean import clean_here

    return clean_here(*(frozenset(filter(None, names.split(","))) for names in (live, gone)))


def _checkpoint(reference: str, folder: str) -> Any:
    from k2cli.agent.model import find_checkpoint

    return find_checkpoint(reference, folder)


def _checkpoint_heads(reference: str) -> Any:
    from k2cli.agent.model import checkpoint_heads

    return checkpoint_heads(reference)


def _networks() -> Any:
    from k2cli.agent.networks import own_networks

    return own_networks()


# --- the same, asked for over ssh ---------------------------------------------------------------


def _memory() -> Any:
    from k2cli.planning.hardware.machine import this_machine

    return this_machine()


def _software(model_folder: str | None = None) -> Any:
    from k2cli.agent.software import software

    return software(model_folder)


def _reach(targets: str) -> Any:
    from k2cli.agent.reach import Target, try_targets

    return try_targets(msgspec.json.decode(targets, type=list[Target]))


def _disk_speed(folder: str) -> Any:
    from k2cli.agent.disk import read_speed

    return read_speed(folder)


# A verb and what answers it: a function of strings whose result msgspec can encode.
_VERBS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "memory": _memory,
    "free-ports": lambda count: free_ports(int(count)),
    "port-holder": lambda host, port: port_holder(host, int(port)),
    "choose-port": lambda host, first: choose_port(host, int(first)),
    "write": write_private,
    "remove-bootstraps": remove_bootstraps,
    "activity": activity,
    "processes": processes_of_run,
    "kill": kill_run,
    "lock-take": _lock_take,
    "lock-renew": _lock_renew,
    "lock-release": _lock_release,
    "locks": _locks,
    "clean": _clean,
    "checkpoint": _checkpoint,
    "checkpoint-heads": _checkpoint_heads,
    "networks": _networks,
    "remove-folder": lambda path: shutil.rmtree(path, ignore_errors=True),
    "software": _software,
    "reach": _reach,
    "disk-speed": _disk_speed,
}
# Verbs that get what comes over stdin as their last argument, in bytes.
_WITH_INPUT = frozenset({"write"}) | {"lock-take"}


def answer(verb: str, arguments: Sequence[str], input: bytes = b"") -> bytes:
    """Carry out one verb here.

    Returns:
        Its result as JSON.

    Raises:
        KeyError: if there is no such verb.
        OSError: if the verb cannot be carried out.
    """
    function = _VERBS[verb]
    extra = (input,) if verb in _WITH_INPUT else ()
    return msgspec.json.encode(function(*arguments, *extra))


def main() -> None:
    """Carry out the verb of the command line and write its result to stdout as JSON."""
    verb, *arguments = sys.argv[1:]
    if verb not in _VERBS:
        sys.stderr.write(f"k2 {__version__} knows no '{verb}' here\n")
        sys.exit(UNKNOWN_VERB_STATUS)
    try:
        result = answer(verb, arguments, sys.stdin.buffer.read() if verb in _WITH_INPUT else b"")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    os.write(1, result + b"\n")


if __name__ == "__main__":
    main()
