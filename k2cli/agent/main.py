"""Verbs of the agent: all questions and orders of k2 to a machine.

``nodes.local`` calls ``answer`` in process; ``nodes.ssh`` runs
``python -m k2cli.agent.main VERB ...`` on the other machine. Both get the result as JSON.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from k2cli import __version__
from k2cli.agent.activity import activity
from k2cli.agent.clean import clean_machine
from k2cli.agent.disk import read_speed
from k2cli.agent.facts import UNKNOWN_VERB_STATUS, facts
from k2cli.agent.locks import Claim, list_locks, release, renew, take
from k2cli.agent.model import checkpoint_heads, find_checkpoint
from k2cli.agent.nccl import nccl
from k2cli.agent.networks import own_networks
from k2cli.agent.ports import choose_port, free_ports, port_holder
from k2cli.agent.reach import Target, try_targets
from k2cli.agent.run_folder import remove_bootstraps, write_private
from k2cli.agent.run_processes import count_processes, kill_run, processes_of_run
from k2cli.errors import K2Error
from k2cli.files import decode_json, encode_json
from k2cli.prefix_folder import prefix_room
from k2cli.scratch import make_scratch
from k2cli.settings import expand_home
from k2cli.stderr import say_on_stderr


def _memory() -> Any:
    from k2cli.agent.gpus import machine_with_runs  # slow to import

    return machine_with_runs()


def _software(model_folder: str | None = None) -> Any:
    from k2cli.agent.software import software  # slow to import

    return software(model_folder)


def _weights(reference: str) -> Any:
    from k2cli.agent.weights.model_files import model_files

    return model_files(reference)


def _weights_digests(folder: str, *names: str) -> Any:
    from k2cli.agent.weights.model_files import digests

    return digests(folder, *names)


def _models(what: str, question: bytes) -> Any:
    from k2cli.agent.weights import stored_models  # slow to import

    functions: dict[str, Callable[[Any], Any]] = {
        "list": stored_models.list_models,
        "show": stored_models.describe_model,
        "removal": stored_models.plan_removal,
        "remove": stored_models.remove,
        "prunable": stored_models.prunable,
        "prune": stored_models.prune_agreed,
    }
    return functions[what](decode_json(question, type=stored_models.ModelQuestion))


def _check_tls(certificate: str, key: str) -> Any:
    from k2cli.access.tls_files import check_tls_files  # ssl is slow to import

    return check_tls_files(certificate, key)


def _make_link_model(folder: str) -> Any:
    from k2cli.models.link_check_model import make_link_check_model

    return str(make_link_check_model(expand_home(folder)))


def _clean(live: str, gone: str) -> Any:
    return clean_machine(*(frozenset(filter(None, ids.split(","))) for ids in (live, gone)))


def _lock_take(share: str, claim: bytes) -> Any:
    return take(decode_json(claim, type=Claim), count_processes, share=share == "1")


# Verb -> function of strings whose result msgspec can encode.
_VERBS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "memory": _memory,
    "software": _software,
    "networks": own_networks,
    "nccl": nccl,
    "disk-speed": read_speed,
    "reach": lambda targets: try_targets(decode_json(targets, type=list[Target])),
    "free-ports": lambda count: free_ports(int(count)),
    "port-holder": lambda host, port: port_holder(host, int(port)),
    "choose-port": lambda host, first: choose_port(host, int(first)),
    "write": write_private,
    "make-scratch": lambda run_id: str(make_scratch(run_id)),
    "prefix-room": prefix_room,
    "remove-bootstraps": remove_bootstraps,
    "remove-folder": lambda path: shutil.rmtree(path, ignore_errors=True),
    "checkpoint": find_checkpoint,
    "checkpoint-heads": checkpoint_heads,
    "weights": _weights,
    "weights-digests": _weights_digests,
    "models": _models,
    "make-link-model": _make_link_model,
    "activity": activity,
    "processes": processes_of_run,
    "kill": kill_run,
    "clean": _clean,
    "check-tls": _check_tls,
    "lock-take": _lock_take,
    "lock-renew": lambda run_id, pid, *start: renew(run_id, int(pid), float(start[0]), *start[1:]),
    "lock-release": release,
    "locks": lambda: list_locks(count_processes),
}
# Verbs whose last argument is the bytes of stdin.
_WITH_INPUT = frozenset({"write", "lock-take", "models"})


def answer(verb: str, arguments: Sequence[str], input: bytes = b"") -> bytes:
    """Call the function of a verb.

    Returns:
        The result as JSON.

    Raises:
        KeyError: if there is no such verb.
        OSError: if the function fails.
    """
    function = _VERBS[verb]
    extra = (input,) if verb in _WITH_INPUT else ()
    return encode_json(function(*arguments, *extra), indent=False)


def main() -> None:
    """Call the function of the command line's verb and write the result to stdout as JSON."""
    verb, *arguments = sys.argv[1:]
    if verb not in _VERBS:
        say_on_stderr(f"the agent of k2 {__version__} has no verb '{verb}'")
        sys.exit(UNKNOWN_VERB_STATUS)
    try:
        result = answer(verb, arguments, sys.stdin.buffer.read() if verb in _WITH_INPUT else b"")
    except (OSError, K2Error) as error:
        say_on_stderr(str(error))
        sys.exit(1)
    os.write(1, result)


if __name__ == "__main__":
    main()
